"""What the operator's policy means to a planning round."""

from __future__ import annotations

from collections.abc import Sequence

from placement.cost import Speed
from placement.policy import Override, Policy
from placement.settings import Override as SliceBounds
from placement.settings import PlacementSettings, RoundSettings

_MIB = 1 << 20


def round_settings(policy: Policy, units: int, cores: int | None = None) -> RoundSettings:
    """The settings of `policy` for `placement.round.Round`, for a model that is cut into `units`.

    Replicas that reserve nothing share the `cores` of their hosts: more of them than cores are no faster. None: they
    have devices of their own.
    """
    experts, planner = policy.experts, policy.planner
    most = experts.max_replicas
    if cores is not None and experts.device.kind == "real" and not (experts.resources.cpu or experts.resources.gpu):
        # a gateway that prefers to compute itself has no use for replicas on its own cores but those it is told to have
        helpful = 0 if policy.gateway.inline == "prefer" else max(cores // max(units, 1), 1)
        most = min(most, max(experts.replicas, experts.min_replicas, helpful))
    device = experts.device
    emulated = None
    if device.rows_per_s is not None and device.weight_read_ms is not None:
        emulated = Speed(device.weight_read_ms / 1e3, 1 / device.rows_per_s)
    return RoundSettings(
        method=planner.method,
        placement=PlacementSettings(
            gib_worth=planner.gib_worth,
            max_bytes=_bytes(planner.memory_mib),
            hysteresis=planner.hysteresis,
            imbalance=planner.imbalance,
            spread_above=PlacementSettings().spread_above if planner.spread_nodes else None,
            max_moved_bytes=_bytes(planner.max_moves_mib),
        ),
        replicas=experts.replicas,
        min_replicas=max(experts.min_replicas, int(policy.gateway.inline == "never")),
        max_replicas=most,
        overrides=tuple(_bounds(each) for each in policy.overrides),
        replica_bytes=_bytes(experts.memory_mib),
        headroom=planner.quantile > 0.5,
        idle_to_zero_s=float("inf") if planner.idle_to_zero_s is None else planner.idle_to_zero_s,
        cool_down_s=planner.cool_down_s,
        device=emulated,
    )


def _bounds(override: Override) -> SliceBounds:
    return SliceBounds(
        experts=_named(override.experts),
        layers=_named(override.layers),
        min_replicas=override.min_replicas,
        max_replicas=override.max_replicas,
        pin=override.pin,
    )


def _named(numbers: Sequence[int] | str) -> tuple[int, ...] | None:
    return None if isinstance(numbers, str) else tuple(numbers)


def _bytes(mib: float | None) -> int | None:
    return None if mib is None else int(mib * _MIB)
