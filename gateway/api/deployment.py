"""The Serve deployment of the api: client connections end here, sequences run in gateways."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI
from ray import serve

from experts.wire.sockets import host_id
from gateway.api.app import create_app
from gateway.api.served_model import ApiConfig
from gateway.link.pool import GatewayPool
from gateway.messages import GatewayStatus
from placement import plan
from recovery.directory import START_S, Directory, GatewayEntry


class ApiReplica:
    """Serve makes one for each api process. `nodes` are the application's other deployments, there to be started."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, store: str, fingerprint: str, name: str, redis_url: str, namespace: str, nodes: list[Any]
    ) -> None:
        self._directory = Directory(redis_url, namespace)
        await asyncio.to_thread(self._directory.wait, START_S)
        self._host = host_id()
        self._config = ApiConfig(store=Path(store), model_name=name, request_ids=False)  # the proxy has its own
        secret = await asyncio.to_thread(self._directory.secret)
        self._pool = GatewayPool(self._gateways, secret, fingerprint)

    def __serve_build_asgi_app__(self) -> FastAPI:  # Serve calls it
        """Serve's interface: the app of this replica."""
        return create_app(self._config, self._pool, self._status)

    async def _gateways(self) -> list[str]:
        entries = await asyncio.to_thread(self._directory.gateways)
        return [address for entry in entries if (address := self._address(entry)) is not None]

    def _address(self, entry: GatewayEntry) -> str | None:
        near = entry.host == self._host
        return next((address for address in entry.addresses if address.startswith("unix:") == near), None)

    async def _status(self) -> dict[str, Any]:
        """Gateways, and expert units with their replicas and calls by path; see `evermoe status`."""
        answers = await self._pool.status()
        return await asyncio.to_thread(self._report, answers)

    def _report(self, answers: list[GatewayStatus]) -> dict[str, Any]:
        document = self._directory.read(plan.DOCUMENT)
        planned = plan.decode(document).replicas if document is not None else {}
        replicas = self._directory.replicas()
        entries = {entry.id: entry for entry in self._directory.gateways()}
        return {
            "model": self._config.model_name,
            "gateways": [
                {
                    "pid": entries[answer.gateway].pid,
                    "node": entries[answer.gateway].node,
                    **msgspec.to_builtins(answer),
                }
                for answer in answers
                if answer.gateway in entries
            ],
            "units": [
                {
                    "unit": unit,
                    "planned": planned.get(unit),
                    "ready": sum(replica.unit == unit for replica in replicas),
                    "replicas": [
                        {"id": r.id, "pid": r.pid, "node": r.node, "experts": r.experts, "layers": r.layers}
                        for r in replicas
                        if r.unit == unit
                    ],
                    "calls": _sum([answer.expert_calls.get(unit, {}) for answer in answers]),
                }
                for unit in _ordered({unit for answer in answers for unit in answer.expert_calls} | planned.keys())
            ],
        }


def api_deployment(
    store: str, fingerprint: str, name: str, redis_url: str, namespace: str, nodes: list[serve.Application]
) -> serve.Application:
    """The Serve application: the api as its ingress, over all other `nodes`."""
    ingress = serve.ingress()(ApiReplica)
    deployment = serve.deployment(ingress, name="api", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
    return deployment.bind(store, fingerprint, name, redis_url, namespace, nodes)


def _sum(counts: list[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for path, calls in count.items():
            total[path] = total.get(path, 0) + calls
    return total


def _ordered(units: set[str]) -> list[str]:
    """By number, not by letter: expert-2 before expert-10."""
    return sorted(units, key=lambda unit: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", unit)])
