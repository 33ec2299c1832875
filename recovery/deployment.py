"""The Serve deployment of the embedded Redis, where neither a launcher nor the operator brings a server."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from ray import serve

from recovery.directory import Directory
from recovery.redis_server import RedisServer


class RedisReplica:
    """Runs the embedded Redis at `url` (``unix:///...``) as long as Serve runs this replica."""

    def __init__(self, url: str) -> None:
        self._server = RedisServer(Path(urlsplit(url).path).parent)
        self._server.__enter__()

    def check_health(self) -> None:
        """Serve's health check: raises where Redis does not answer."""
        Directory(self._server.url, "probe").wait()

    def __del__(self) -> None:
        """Serve's way to end it."""
        if hasattr(self, "_server"):
            self._server.__exit__()


def redis_deployment(url: str) -> serve.Application:
    """The Serve application node of the embedded Redis at `url`."""
    return serve.deployment(RedisReplica, name="store", ray_actor_options={"num_cpus": 0}).bind(url)
