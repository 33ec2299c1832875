"""The Serve deployment of a gateway.

Whoever assembles the application imports this; torch and transformers are imported only where a gateway runs.
"""

from __future__ import annotations

import os
from pathlib import Path

import ray
from ray import serve

from placement.policy import Policy
from recovery.directory import Directory

_STOP_S = 10.0
"""What a gateway has to end after its last sequence."""


class GatewayReplica:
    """Serve makes one for each gateway; requests arrive on its own port, not through Serve."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, store: str, policy: Policy, redis_url: str, namespace: str, compiled: str | None, record: Path | None
    ) -> None:
        # How long OpenMP's threads spin before they sleep, read when torch is imported: the cores are shared.
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
        from gateway.gateway import Gateway

        self._gateway = Gateway(
            Path(store),
            policy,
            Directory(redis_url, namespace),
            name=serve.get_replica_context().replica_id.unique_id,
            node=ray.get_runtime_context().get_node_id(),
            node_ip=ray.util.get_node_ip_address(),
            compiled=None if compiled is None else Path(compiled),
            record=record,
        )
        await self._gateway.__aenter__()

    def check_health(self) -> None:
        """Serve's health check: raises where the engine is beyond repair."""
        if not self._gateway.healthy:
            raise RuntimeError("the engine's thread has ended: this gateway wants to be replaced")

    async def __del__(self) -> None:
        """Serve's way to end a gateway."""
        if hasattr(self, "_gateway"):
            await self._gateway.__aexit__()


def gateway_deployment(
    store: str, policy: Policy, redis_url: str, namespace: str, compiled: str | None, record: Path | None = None
) -> serve.Application:
    """The Serve application node of the gateway; `compiled` is where compiled layers are kept, if any are.

    What is routed is recorded in the file `record`, where one is named.
    """
    options = {"num_cpus": 0, "num_gpus": int(_wants_gpu(policy.gateway.device))}
    deployment = serve.deployment(
        GatewayReplica,
        name="gateway",
        ray_actor_options=options,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=policy.api.drain_s + _STOP_S,
    )
    return deployment.bind(store, policy, redis_url, namespace, compiled, record)


def _wants_gpu(device: str) -> bool:
    """Ray hides the GPUs that an actor did not ask for, so `auto` has to be decided here."""
    if device == "auto":
        return bool(ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1)
    return device.startswith("cuda")
