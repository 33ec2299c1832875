"""Membership: who is alive, and where it listens."""
