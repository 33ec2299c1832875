"""A fleet that does what plans say, as Serve would: replicas start some rounds late, and drain before they go."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from placement.arrays import Floats
from placement.cost import Speed
from placement.plan import Plan
from placement.policy import UnitPolicy
from placement.round import Round
from placement.settings import PlacementSettings, RoundSettings
from placement.unit import Unit, make_units
from placement.views import LoadView, ReplicaView

LAYERS = (1, 3, 5)
EXPERTS = 4
SLICE = 1000
INLINE = Speed(read_s=1e-3, row_s=1e-3)
"""A row takes as long as reading the weights: any rows may be split."""
STEPS = 10.0
HORIZON_S = 2.0


def units(experts: int = 1) -> list[Unit]:
    return make_units(UnitPolicy(experts=experts), EXPERTS, LAYERS)


def rounds(settings: RoundSettings, experts: int = 1, last: Plan | None = None) -> Round:
    return Round(units(experts), LAYERS, EXPERTS, SLICE, settings, last=last)


def settings(*, budget: int | None = None, gib_worth: float = 0.0, **given: object) -> RoundSettings:
    """Settings with a budget in slices."""
    placement = PlacementSettings(
        max_bytes=None if budget is None else budget * SLICE, gib_worth=gib_worth, spread_above=None, imbalance=1.05
    )
    return dataclasses.replace(RoundSettings(placement=placement), **given)  # type: ignore[arg-type]


def load(now_s: float, per_step: Sequence[float] | Floats, idle_s: float | Floats = 0.0) -> LoadView:
    """So many rows of each expert a step, in all layers alike; none: nothing runs."""
    rows = np.broadcast_to(np.asarray(per_step, dtype=np.float64), (len(LAYERS), EXPERTS)) * STEPS * HORIZON_S
    idle = np.broadcast_to(np.asarray(idle_s, dtype=np.float64), rows.shape)
    return LoadView(now_s, rows, rows, HORIZON_S, STEPS if rows.any() else 0.0, idle)


def whole(unit: str, number: int, **given: object) -> ReplicaView:
    """A replica that holds nothing yet."""
    view = ReplicaView(id=f"{unit}#{number}", unit=unit, node="a", host="a", started_at=float(number))
    return dataclasses.replace(view, **given)  # type: ignore[arg-type]


def shares(plan: Plan) -> dict[tuple[int, int], dict[str, float]]:
    """(layer, expert) -> replica id -> share."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for replica, copies in (plan.copies or {}).items():
        for copy in copies:
            found.setdefault((copy.layer, copy.expert), {})[replica] = copy.share
    return found


class Fleet:
    """Live replicas, after `plan`."""

    def __init__(self, delay: int = 2, drains: int = 1) -> None:
        self.replicas: list[ReplicaView] = []
        self._delay, self._drains = delay, drains
        self._starting: list[tuple[int, str]] = []
        self._going: dict[str, int] = {}
        self._started = 0

    def obey(self, plan: Plan) -> None:
        """One round passes."""
        self.replicas = [each for each in self.replicas if self._going.get(each.id, 1) > 0]
        self._going = {each: left - 1 for each, left in self._going.items()}
        for unit in [unit for left, unit in self._starting if left <= 1]:
            self._started += 1
            self.replicas.append(whole(unit, self._started))
        self._starting = [(left - 1, unit) for left, unit in self._starting if left > 1]
        for unit, wanted in plan.replicas.items():
            self._scale(unit, wanted)
        self.replicas = [self._hold(each, plan) for each in self.replicas]

    def _scale(self, unit: str, wanted: int) -> None:
        live = [each.id for each in self.replicas if each.unit == unit and each.id not in self._going]
        starting = [name for _, name in self._starting].count(unit)
        self._starting += [(self._delay, unit)] * (wanted - len(live) - starting)
        for replica in live[wanted:]:
            self._going[replica] = self._drains

    def _hold(self, replica: ReplicaView, plan: Plan) -> ReplicaView:
        copies = (plan.copies or {}).get(replica.id, [])
        slices = frozenset((copy.layer, copy.expert) for copy in copies)
        return dataclasses.replace(replica, slices=slices, draining=replica.id in self._going)
