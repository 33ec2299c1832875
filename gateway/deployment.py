"""The Serve deployment of a gateway.

Serve's replica is a small process that keeps the gateway's own: when that one is lost, another is forked within
moments, and Serve need not know. When the replica itself is lost, the gateway goes with it and Serve starts both again.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import ray
from ray import serve

from gateway.keeper import Keeper
from gateway.nursery import Order
from placement.policy import Policy, PolicyError

_STOP_S = 10.0
"""What a gateway has to end after its last sequence."""
_HEALTH_PERIOD_S = 0.2
_HEALTH_TIMEOUT_S = 10.0
_HEALTH_HELD_S = 5.0
"""Serve notices at once that a replica is gone while it waits for its answer: so it waits most of the time."""


class GatewayReplica:
    """Serve makes one for each gateway; requests arrive on its own port, not through Serve."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, store: str, policy: Policy, redis_url: str, namespace: str, compiled: str | None, record: Path | None
    ) -> None:
        order = Order(
            store=store,
            policy=policy.model_dump_json(),
            redis_url=redis_url,
            namespace=namespace,
            name=serve.get_replica_context().replica_id.unique_id,
            node=ray.get_runtime_context().get_node_id(),
            node_ip=ray.util.get_node_ip_address(),
            compiled=compiled,
            record=None if record is None else str(record),
        )
        self._asked = False
        self._keeper = Keeper(order, limit_s=policy.api.drain_s + _STOP_S)
        await self._keeper.__aenter__()

    async def check_health(self) -> None:
        """Serve's health check, which takes its time: raises where there is no gateway and none will come back."""
        if self._asked:  # the first one is part of the start
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._keeper.failed.wait(), _HEALTH_HELD_S)
        self._asked = True
        if self._keeper.failure is not None:
            raise RuntimeError(self._keeper.failure)

    async def __del__(self) -> None:
        """Serve's way to end a gateway."""
        if hasattr(self, "_keeper"):
            await self._keeper.__aexit__()


def gateway_deployment(
    store: str, policy: Policy, redis_url: str, namespace: str, compiled: str | None, record: Path | None = None
) -> serve.Application:
    """The Serve application node of the gateways; `compiled` is where compiled layers are kept, if any are.

    What is routed is recorded in the file `record`, where one is named. Raise PolicyError where several would write it.
    """
    if record is not None and policy.gateway.replicas > 1:
        raise PolicyError(f"{policy.gateway.replicas} gateways can't write one record: set gateway.replicas to 1")
    options = {"num_cpus": 0, "num_gpus": int(_wants_gpu(policy.gateway.device))}
    deployment = serve.deployment(
        GatewayReplica,
        name="gateway",
        num_replicas=policy.gateway.replicas,
        ray_actor_options=options,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=policy.api.drain_s + _STOP_S,
    )
    return deployment.bind(store, policy, redis_url, namespace, compiled, record)


def _wants_gpu(device: str) -> bool:
    """Ray hides the GPUs that an actor did not ask for, so `auto` has to be decided here."""
    if device == "auto":
        return bool(ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1)
    return device.startswith("cuda")
