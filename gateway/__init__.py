"""Persistent side: HTTP API, scheduler, KV cache, attention and expert dispatch."""
