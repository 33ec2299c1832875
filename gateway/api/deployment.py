"""The Serve deployment of the api: client connections end here, sequences run in gateways."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve

from experts.wire.sockets import host_id
from gateway.api import request_log
from gateway.api.app import create_app
from gateway.api.drain import CUT_S
from gateway.api.limits import Limits
from gateway.api.listener import listening
from gateway.api.report import make_report
from gateway.api.served_model import ApiConfig
from gateway.link.pool import GatewayPool
from recovery.directory import START_S, Directory, GatewayEntry
from recovery.journal import Journal

STOP_S = 10.0
"""What a replica has to end after its last request."""
_HEALTH_PERIOD_S = 0.2
_HEALTH_HELD_S = 5.0
"""Serve notices at once that a replica is gone while it waits for its answer: so it waits most of the time."""


class ApiReplica:
    """Serve makes one for each api process. `nodes` are the application's other deployments, there to be started."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: ApiConfig,
        fingerprint: str,
        redis_url: str,
        namespace: str,
        listen: tuple[str, int] | None,
        nodes: list[Any],
    ) -> None:
        self._directory = Directory(redis_url, namespace)
        await asyncio.to_thread(self._directory.wait, START_S)
        self._host = host_id()
        self._config = config
        secret = await asyncio.to_thread(self._directory.secret)
        self._pool = GatewayPool(self._gateways, secret, fingerprint)
        self._limits = Limits(redis_url, namespace)
        self._journal = Journal(redis_url, namespace)
        self._listen = listen
        self._asked = False
        self._exits = AsyncExitStack()
        request_log.start(config.policy.request_log)

    async def __serve_build_asgi_app__(self) -> FastAPI:  # Serve calls it
        """Serve's interface: the app of this replica. Where it has a port of its own, it listens from now on."""
        app = create_app(self._config, self._pool, self._status, self._limits, self._journal)
        if self._listen is not None:
            await self._exits.enter_async_context(listening(app, *self._listen))
        return app

    async def check_health(self) -> None:
        """Serve's health check, which takes its time, but for the first, which is part of the start."""
        if self._asked:
            await asyncio.sleep(_HEALTH_HELD_S)
        self._asked = True

    async def __del__(self) -> None:
        """Serve's way to end an api; the application's lifespan has ended by then, requests and all."""
        if hasattr(self, "_exits"):
            await self._exits.aclose()

    async def _gateways(self) -> list[str]:
        entries = await asyncio.to_thread(self._directory.gateways)
        return [address for entry in entries if (address := self._address(entry)) is not None]

    def _address(self, entry: GatewayEntry) -> str | None:
        near = entry.host == self._host
        return next((address for address in entry.addresses if address.startswith("unix:") == near), None)

    async def _status(self) -> dict[str, Any]:
        """Gateways, and expert units with their replicas and calls by path; see `evermoe status`."""
        answers = await self._pool.status()
        return await asyncio.to_thread(make_report, self._config.model_name, self._directory, answers)


def api_deployment(
    config: ApiConfig,
    fingerprint: str,
    redis_url: str,
    namespace: str,
    listen: tuple[str, int] | None,
    nodes: list[serve.Application],
) -> serve.Application:
    """The Serve application: the api as its ingress, over all other `nodes`.

    It listens on the host and port `listen` itself; None: requests come through Serve's proxy.
    """
    deployment = serve.deployment(
        serve.ingress()(ApiReplica),
        name="api",
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=_HEALTH_PERIOD_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=config.policy.drain_s + CUT_S + STOP_S,
        logging_config={"enable_access_log": False},  # we have our own, in JSON
    )
    config = replace(config, request_ids=listen is not None)  # the proxy answers with its own
    return deployment.bind(config, fingerprint, redis_url, namespace, listen, nodes)
