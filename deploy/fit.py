"""Whether a policy fits what is there: the model, and this host or the Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil

from placement.policy import Policy
from placement.policy.fitting import ModelFacts, NodeFacts, check_fit


def check_policy(
    policy: Policy, file: Path | None, model: ModelFacts | None, nodes: Sequence[NodeFacts] | None
) -> None:
    """Raise PolicyError for what the model or the cluster can't satisfy; what is None is not asked about."""
    check_fit(policy, "the default policy" if file is None else str(file), model=model, nodes=nodes)


def this_host(*, gpus: bool) -> NodeFacts:
    """What a cluster of this host alone has. Its GPUs are counted only where `gpus` matter: that imports torch."""
    count = 0
    if gpus:
        import torch

        count = torch.cuda.device_count()
    memory = psutil.virtual_memory().total
    return NodeFacts(name="this host", cpu=os.cpu_count() or 1, gpu=count, memory_bytes=memory)


def cluster_nodes() -> list[NodeFacts] | None:
    """The nodes of the Ray cluster that this process belongs to; None where it belongs to none."""
    import ray

    if not ray.is_initialized():
        return None
    return [_node(node["NodeManagerHostname"], node["Resources"]) for node in ray.nodes() if node["Alive"]] or None


def _node(name: str, resources: dict[str, float]) -> NodeFacts:
    rest = {key: amount for key, amount in resources.items() if key not in ("CPU", "GPU", "memory")}
    cpu, gpu, memory = (resources.get(key, 0.0) for key in ("CPU", "GPU", "memory"))
    return NodeFacts(name=name, cpu=cpu, gpu=gpu, custom=rest, memory_bytes=int(memory))
