"""The Serve deployment of a gateway: the engine with its model, the fleet of replicas it uses, and its own port."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import ray
import torch
from ray import serve

from experts.ffn import ExpertFFN
from experts.store import ExpertStore, Manifest
from experts.wire.sockets import host_id
from gateway.dispatch import Dispatcher
from gateway.engine import Engine, EngineSettings
from gateway.fleet import DispatchTable, Fleet
from gateway.link.server import GatewayServer
from gateway.messages import GatewayStatus
from gateway.model import load_model
from placement import plan
from placement.plan import Plan
from placement.policy import GatewayPolicy, Policy
from placement.unit import Unit, make_units
from recovery.directory import START_S, Directory, GatewayEntry
from recovery.lease import Lease


class GatewayReplica:
    """Serve makes one for each gateway. It answers before any expert has a replica: rows then run inline."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, store: str, policy: Policy, redis_url: str, namespace: str
    ) -> None:
        torch.set_num_threads(policy.gateway.threads or os.cpu_count() or 1)
        opened = ExpertStore.open(Path(store))
        directory = Directory(redis_url, namespace)
        directory.wait(START_S)
        self._id = serve.get_replica_context().replica_id.unique_id
        self._units = make_units(policy.experts.unit, opened.manifest.num_experts, opened.manifest.moe_layers)
        self._exits = contextlib.AsyncExitStack()
        self._dispatcher = self._connect(opened, policy, directory)
        model = load_model(opened, device=_device(policy.gateway.device), experts=self._dispatcher)
        self._engine = Engine(model, _settings(policy.gateway))
        self._server = await self._exits.enter_async_context(
            GatewayServer(
                self._engine,
                secret=directory.secret(),
                fingerprint=opened.manifest.fingerprint,
                status=self._status,
                tcp_host=ray.util.get_node_ip_address(),
            )
        )
        self._exits.enter_context(Lease(directory, self._entry(opened.manifest)))
        first = Plan(
            epoch=1, replicas={u.name: policy.experts.replicas for u in self._units}, reason="the policy's start"
        )
        directory.publish(plan.DOCUMENT, plan.encode(first), only_first=True)

    def _connect(self, store: ExpertStore, policy: Policy, directory: Directory) -> Dispatcher:
        """The dispatcher with the fleet it uses; an expert's inline copy is unmapped once replicas cover it."""
        inline = ExpertFFN(store, device="cpu")
        manifest = store.manifest
        fleet = Fleet(directory, directory.secret(), manifest.fingerprint, lambda t: _release(inline, t, manifest))
        dispatcher = Dispatcher(
            self._exits.enter_context(fleet), inline, manifest.num_experts,
            policy.experts.min_rows_per_replica, policy.gateway.call_deadline_s,
        )  # fmt: skip
        self._exits.callback(dispatcher.close)
        return dispatcher

    def _entry(self, manifest: Manifest) -> GatewayEntry:
        return GatewayEntry(
            id=self._id,
            pid=os.getpid(),
            node=ray.get_runtime_context().get_node_id(),
            host=host_id(),
            addresses=self._server.addresses,
            fingerprint=manifest.fingerprint,
        )

    def _status(self, query_id: int) -> GatewayStatus:
        pool = self._engine.pool
        return GatewayStatus(
            query_id=query_id,
            gateway=self._id,
            running=self._engine.running,
            waiting=self._engine.waiting,
            kv_blocks_used=pool.used,
            kv_blocks_total=pool.total,
            expert_calls=_by_unit(self._units, dict(self._dispatcher.calls)),
        )

    def check_health(self) -> None:
        """Serve's health check: raises where the engine is beyond repair."""
        if not self._server.healthy:
            raise RuntimeError("the engine's thread has ended: this gateway wants to be replaced")

    async def __del__(self) -> None:
        """Serve's way to end a gateway: the lease first, then the connections, the fleet last."""
        if hasattr(self, "_exits"):
            await self._exits.aclose()


def gateway_deployment(store: str, policy: Policy, redis_url: str, namespace: str) -> serve.Application:
    """The Serve application node of the gateway."""
    deployment = serve.deployment(
        GatewayReplica,
        name="gateway",
        ray_actor_options={"num_cpus": 0, "num_gpus": 1 if _device(policy.gateway.device) != "cpu" else 0},
    )
    return deployment.bind(store, policy, redis_url, namespace)


def _settings(policy: GatewayPolicy) -> EngineSettings:
    return EngineSettings(
        kv_cache_gib=policy.kv_cache_gib, token_budget=policy.max_batch_tokens, max_sequences=policy.max_running
    )


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def _release(inline: ExpertFFN, table: DispatchTable, manifest: Manifest) -> None:
    for expert in inline.loaded:
        if all(table.copies(layer, expert) for layer in manifest.moe_layers):
            inline.unload(expert)


def _by_unit(units: list[Unit], calls: dict[tuple[int, int, str], int]) -> dict[str, dict[str, int]]:
    names = {(layer, expert): unit.name for unit in units for layer in unit.layers for expert in unit.experts}
    totals: dict[str, dict[str, int]] = {unit.name: {} for unit in units}
    for (layer, expert, path), count in calls.items():
        paths = totals[names[layer, expert]]
        paths[path] = paths.get(path, 0) + count
    return totals
