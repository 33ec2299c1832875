"""Serverless side: the expert store, replicas, their arithmetic and the data plane."""
