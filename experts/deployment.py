"""The Serve deployment of an expert unit: a warm process that maps its slices and answers on the wire."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from ray import serve

from experts.ffn import ExpertFFN
from experts.store import ExpertStore
from experts.wire.frame import Segment
from experts.wire.server import ExpertServer, NotServedError
from experts.wire.sockets import host_id
from placement.policy import ExpertPolicy
from placement.unit import Unit
from recovery.directory import START_S, Directory, ReplicaEntry
from recovery.lease import Lease


class ExpertReplica:
    """Serve makes one for each replica: maps the unit's slices, listens, and keeps a lease in the directory.

    Rows arrive on its own sockets; Serve only starts it, watches it and ends it.
    """

    def __init__(self, unit: Unit, store: str, policy: ExpertPolicy, redis_url: str, namespace: str) -> None:
        import ray

        torch.set_num_threads(policy.threads)
        self._unit = unit
        self._slices = frozenset((layer, expert) for layer in unit.layers for expert in unit.experts)
        opened = ExpertStore.open(Path(store))
        self._ffn = ExpertFFN(opened, device="cpu" if not policy.resources.gpu else "cuda")
        for expert in unit.experts:
            self._ffn.load(expert)
        directory = Directory(redis_url, namespace)
        directory.wait(START_S)
        self._exits = contextlib.ExitStack()
        self._server = self._exits.enter_context(
            ExpertServer(self._compute, directory.secret(), opened.manifest.fingerprint, ray.util.get_node_ip_address())
        )
        entry = ReplicaEntry(
            id=serve.get_replica_context().replica_id.unique_id,
            unit=unit.name,
            pid=os.getpid(),
            node=ray.get_runtime_context().get_node_id(),
            host=host_id(),
            addresses=self._server.addresses,
            experts=list(unit.experts),
            layers=list(unit.layers),
            fingerprint=opened.manifest.fingerprint,
        )
        self._exits.enter_context(Lease(directory, entry))

    def _compute(self, layer: int, segments: Sequence[Segment], rows: torch.Tensor, out: torch.Tensor) -> None:
        for expert, _ in segments:
            if (layer, expert) not in self._slices:
                raise NotServedError(f"expert {expert} of layer {layer} is not served by {self._unit.name}")
        self._ffn.compute(layer, segments, rows, out)

    def check_health(self) -> None:
        """Serve's health check: raises where this replica no longer listens."""
        if not self._server.listening:
            raise RuntimeError(f"a replica of {self._unit.name} stopped listening")

    def __del__(self) -> None:
        """Serve's way to end a replica: the lease first, so that no gateway sends new rows, then the sockets."""
        if hasattr(self, "_exits"):
            self._exits.close()


def expert_deployment(
    unit: Unit, store: str, policy: ExpertPolicy, redis_url: str, namespace: str
) -> serve.Application:
    """The Serve application node of `unit`: autoscaled from 0 by the plan."""
    scaling = {
        "min_replicas": 0,
        "initial_replicas": 0,
        "max_replicas": policy.max_replicas,
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "downscale_to_zero_delay_s": 0,
        "policy": {
            "policy_function": "experts.autoscaling:PlannedReplicas",
            "policy_kwargs": {"redis_url": redis_url, "namespace": namespace, "unit": unit.name},
        },
    }
    resources = {"num_cpus": policy.resources.cpu, "num_gpus": policy.resources.gpu}
    deployment = serve.deployment(
        ExpertReplica,
        name=unit.name,
        autoscaling_config=scaling,
        ray_actor_options=resources,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=5.0,
    )
    return deployment.bind(unit, store, policy, redis_url, namespace)
