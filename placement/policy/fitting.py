"""Whether a policy fits a model and a cluster. Pure: what is known of them is given."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from placement.policy.bounds import slice_bounds
from placement.policy.policy import Policy
from placement.policy.reading import PolicyError

MIB = 1 << 20
WORKER_MIB = 200
"""What a worker with torch loaded takes."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a policy has to fit of a model."""

    name: str
    experts: int
    layers: tuple[int, ...]
    """MoE layers by their number in the model."""
    slice_bytes: int


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What Ray may reserve on a node; `memory_bytes` 0: not known."""

    name: str
    cpu: float
    gpu: float = 0.0
    custom: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: int = 0


def check_fit(
    policy: Policy, name: str, *, model: ModelFacts | None = None, nodes: Sequence[NodeFacts] | None = None
) -> None:
    """Raise PolicyError, one line for each key of the file `name` that the model or the cluster can't satisfy."""
    found = [*([] if model is None else _model(policy, model)), *([] if nodes is None else _cluster(policy, nodes))]
    if found:
        raise PolicyError(*(f"{name}: {mistake}" for mistake in found))


def _model(policy: Policy, model: ModelFacts) -> Iterator[str]:
    unit = policy.experts.unit
    if unit.experts > model.experts:
        yield f"experts.unit.experts: {unit.experts} is more than {model.name} has ({model.experts}): lower it"
    if unit.layers != "all" and unit.layers > len(model.layers):
        has = f"{model.name} has MoE layers ({len(model.layers)})"
        yield f"experts.unit.layers: {unit.layers} is more than {has}: lower it, or say all"
    for number, override in enumerate(policy.overrides):
        where = f"overrides.{number}"
        yield from _lacks(f"{where}.experts", "expert", override.experts, range(model.experts), model.name)
        yield from _lacks(f"{where}.layers", "MoE layer", override.layers, model.layers, model.name)
    yield from _memory(policy, model)


def _lacks(key: str, what: str, named: tuple[int, ...] | str, there: Collection[int], name: str) -> Iterator[str]:
    missing = [str(number) for number in named if number not in there] if isinstance(named, tuple) else []
    if missing:
        yield f"{key}: {name} has no {what} {', '.join(missing)}: it has {spans(sorted(there))}"


def _memory(policy: Policy, model: ModelFacts) -> Iterator[str]:
    one = model.slice_bytes / MIB
    for key, value in {"experts": policy.experts.memory_mib, "planner": policy.planner.memory_mib}.items():
        if value is not None and value < one:
            yield f"{key}.memory_mib: {value:g} MiB hold no slice of {model.name} ({one:.3g} MiB): raise it"
            return
    budget = policy.planner.memory_mib
    copies = sum(slice_bounds(policy, layer, expert).least for layer in model.layers for expert in range(model.experts))
    if budget is not None and copies * one > budget:
        yield (
            f"planner.memory_mib: {budget:g} MiB are less than the copies that every slice keeps by min_replicas take "
            f"({copies} of {one:.3g} MiB, {copies * one:.4g} MiB): raise it, or lower min_replicas"
        )


def _cluster(policy: Policy, nodes: Sequence[NodeFacts]) -> Iterator[str]:
    asked = {"cpu": policy.experts.resources.cpu, "gpu": policy.experts.resources.gpu}
    alone = []
    for key, amount in asked.items():
        most = max(float(getattr(node, key)) for node in nodes)
        if amount > most:
            alone.append(f"experts.resources.{key}: {amount:g} for a replica, {_at_most(most, key)}: lower it")
    for key, amount in policy.experts.resources.custom.items():
        most = max(node.custom.get(key, 0.0) for node in nodes)
        if amount > most:
            remedy = "lower it, or start nodes with `ray start --resources`"
            alone.append(f"experts.resources.custom.{key}: {amount:g} for a replica, {_at_most(most, key)}: {remedy}")
    yield from alone
    if not alone and not any(_holds(node, policy) for node in nodes):
        yield "experts.resources: no node has all of it together: lower one"
    if policy.gateway.device.startswith("cuda") and not any(node.gpu for node in nodes):
        yield f"gateway.device: {policy.gateway.device}, and no node has a GPU: take auto or cpu"
    yield from _workers(policy.planner.warm_pool, nodes)


def _at_most(most: float, key: str) -> str:
    return f"and no node has more than {most:g}" if most else f"and no node has any {key}"


def _holds(node: NodeFacts, policy: Policy) -> bool:
    asked = policy.experts.resources
    return (
        asked.cpu <= node.cpu
        and asked.gpu <= node.gpu
        and all(amount <= node.custom.get(key, 0.0) for key, amount in asked.custom.items())
    )


def _workers(count: int, nodes: Sequence[NodeFacts]) -> Iterator[str]:
    least = min(node.memory_bytes for node in nodes)
    if least and count * WORKER_MIB * MIB > least / 2:
        yield (
            f"planner.warm_pool: {count} workers take about {count * WORKER_MIB} MiB, over half of a node's memory "
            f"({least / MIB:.0f} MiB): lower it"
        )


def spans(numbers: Sequence[int]) -> str:
    """``0-3, 5`` for [0, 1, 2, 3, 5]."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
