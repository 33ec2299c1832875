"""What a policy means, in a few lines for the operator."""

from __future__ import annotations

from collections.abc import Iterator

from placement.policy.bounds import Bounds, unit_bounds
from placement.policy.fitting import MIB, WORKER_MIB, ModelFacts
from placement.policy.planner import PlannerPolicy
from placement.policy.policy import Policy
from placement.unit import Unit, make_units

_INLINE = {
    "fallback": "the gateway computes what no replica serves",
    "prefer": "the gateway also computes what is faster there than over the wire",
    "never": "the gateway computes no experts: rows wait for replicas, and every unit keeps one",
}
_ON_LOSS = {"inline": "", "wait": "; when the last replica of an expert is lost, its rows wait for the next"}


def meaning(policy: Policy, model: ModelFacts | None) -> list[str]:
    """Lines on units, memory, planning and devices; those on units and memory need the `model`."""
    return [*([] if model is None else _fleet(policy, model)), *_replica(policy), *_planning(policy), _gateway(policy)]


def _fleet(policy: Policy, model: ModelFacts) -> Iterator[str]:
    units = make_units(policy.experts.unit, model.experts, model.layers)
    bounds = [unit_bounds(policy, unit) for unit in units]
    slices = len(model.layers) * model.experts
    yield (
        f"{model.name}: {len(model.layers)} MoE layers x {model.experts} experts are {slices} slices of "
        f"{_mib(model.slice_bytes)} in {_many(len(units), 'unit')} of up to {_many(_slices(units[0]), 'slice')}"
    )
    starts = [each.clamp(policy.experts.replicas) for each in bounds]
    yield f"replicas of a unit: {_range(starts)} to start with, then {_between(bounds)}"
    whole = [_slices(unit) * model.slice_bytes for unit in units]
    limit = None if policy.experts.memory_mib is None else int(policy.experts.memory_mib * MIB)
    held = [size if limit is None else min(limit, size) for size in whole]
    start = sum(count * size for count, size in zip(starts, held, strict=True))
    most = sum(each.most * size for each, size in zip(bounds, held, strict=True))
    yield (
        f"memory: a replica holds up to {_mib(max(held))} of weights"
        f"{'' if limit is None or limit >= max(whole) else f' of its {_mib(max(whole))}'}; "
        f"all together {_mib(start)} to start with, {_at_most(policy, most, sum(whole))}"
    )


def _at_most(policy: Policy, most: int, once: int) -> str:
    """What all replicas may hold together: `most` by their number, unless it is bounded; `once` is the whole model."""
    budget, replicas = policy.planner.memory_mib, max(1, policy.experts.replicas)
    bound = replicas * once if budget is None else int(budget * MIB)
    if not policy.planned or most <= bound:
        return f"{_mib(most)} at most"
    key = "experts.replicas; planner.memory_mib raises it" if budget is None else "planner.memory_mib"
    return f"{_mib(bound)} at most ({key})"


def _replica(policy: Policy) -> Iterator[str]:
    device, asked = policy.experts.device, policy.experts.resources
    if device.kind == "emulated":
        yield (
            f"devices: EMULATED, {device.rows_per_s:g} rows/s, {device.weight_read_ms:g} ms to read a slice, "
            f"{device.call_ms:g} ms a call"
        )
    names = {"CPUs": asked.cpu, "GPUs": asked.gpu, **asked.custom}
    reserved = ", ".join(f"{amount:g} {name}" for name, amount in names.items() if amount)
    yield f"a replica computes with {_many(policy.experts.threads, 'thread')} and reserves {reserved or 'nothing'}"


def _planning(policy: Policy) -> Iterator[str]:
    planner = policy.planner
    if not policy.planned:
        key = "planner" if not planner.enabled else "predictor"
        yield f"planning: none ({key}.enabled is false): experts.replicas stays"
        return
    load = "the expected load" if planner.quantile == 0.5 else "the load that is exceeded one time in ten"
    yield (
        f"planning: {planner.method}, every {planner.interval_s:g} s, for {load} of the next "
        f"{policy.predictor.horizon_s:g} s; the busiest device within {planner.imbalance:g}x of the mean"
    )
    yield "down: " + "; ".join(_down(planner))
    if planner.warm_pool:
        yield f"warm pool: {_many(planner.warm_pool, 'worker')}, about {planner.warm_pool * WORKER_MIB} MiB"


def _down(planner: PlannerPolicy) -> Iterator[str]:
    idle = planner.idle_to_zero_s
    yield "idle units stay" if idle is None else f"a unit without a row for {idle:g} s goes to its fewest replicas"
    if planner.gib_worth:
        yield f"a copy goes when a GiB saves less than {planner.gib_worth:g} s of waiting a second"
    yield f"at most one step down in {planner.cool_down_s:g} s"


def _gateway(policy: Policy) -> str:
    return f"inline: {_INLINE[policy.gateway.inline]}{_ON_LOSS[policy.experts.on_loss]}"


def _slices(unit: Unit) -> int:
    return len(unit.layers) * len(unit.experts)


def _between(bounds: list[Bounds]) -> str:
    least, most = _range([each.least for each in bounds]), _range([each.most for each in bounds])
    return f"at least {least} and at most {most}"


def _range(counts: list[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)}-{max(counts)}"


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _mib(size: float) -> str:
    return f"{size / MIB:.3g} MiB" if size < 1000 * MIB else f"{size / (1 << 30):.3g} GiB"
