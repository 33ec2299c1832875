"""The Serve deployment of an expert unit.

Whoever assembles the application imports this; torch is imported only where a replica runs.
"""

from __future__ import annotations

from pathlib import Path

import ray
from ray import serve

from experts.preload import import_gently
from placement.policy import ExpertPolicy
from placement.unit import Unit
from recovery.directory import Directory

_MOST_REPLICAS = 1000
"""Serve's own bound, which can't change while it runs; the policy's can."""


class ExpertReplica:
    """Serve makes one for each replica. Rows arrive on its own sockets; Serve only starts, watches and ends it."""

    def __init__(
        self, unit: Unit, store: str, policy: ExpertPolicy, redis_url: str, namespace: str, compiled: str | None
    ) -> None:
        import_gently()
        from experts.replica import Replica

        self._replica = Replica(
            unit,
            Path(store),
            policy,
            Directory(redis_url, namespace),
            name=serve.get_replica_context().replica_id.unique_id,
            node=ray.get_runtime_context().get_node_id(),
            node_ip=ray.util.get_node_ip_address(),
            compiled=None if compiled is None else Path(compiled),
        )

    def check_health(self) -> None:
        """Serve's health check: raises where this replica no longer listens."""
        if not self._replica.listening:
            raise RuntimeError("the replica stopped listening")

    def __del__(self) -> None:
        """Serve's way to end a replica."""
        if hasattr(self, "_replica"):
            self._replica.close()


def expert_deployment(
    unit: Unit, store: str, policy: ExpertPolicy, redis_url: str, namespace: str, compiled: str | None
) -> serve.Application:
    """The Serve application node of `unit`: autoscaled from 0 by the plan; `compiled` is where kernels are kept."""
    scaling = {
        "min_replicas": 0,
        "initial_replicas": 0,
        "max_replicas": _MOST_REPLICAS,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "downscale_to_zero_delay_s": 0,
        "policy": {
            "policy_function": "experts.autoscaling:PlannedReplicas",
            "policy_kwargs": {
                "redis_url": redis_url,
                "namespace": namespace,
                "unit": unit.name,
                "experts": list(unit.experts),
                "layers": list(unit.layers),
            },
        },
    }
    deployment = serve.deployment(
        ExpertReplica,
        name=unit.name,
        autoscaling_config=scaling,
        ray_actor_options={
            "num_cpus": policy.resources.cpu,
            "num_gpus": policy.resources.gpu,
            "resources": dict(policy.resources.custom),
        },
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5.0,
    )
    return deployment.bind(unit, store, policy, redis_url, namespace, compiled)
