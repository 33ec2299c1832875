"""Forecasts of expert load: arrays in, arrays out. No Ray, no Redis, no clock."""
