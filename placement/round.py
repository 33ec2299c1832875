"""One planning round: from the load to come and the live replicas to a plan. Pure: it remembers, and has no clock.

Two speeds. How many replicas a unit has changes in seconds, since Serve starts and stops processes (`counts.py`); which
slices they hold and what part of the rows they get changes at once (`placer.py`), among the replicas there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from placement.arrays import Bools, Ints
from placement.baselines import moeless
from placement.baselines.static import static
from placement.cost import Speed
from placement.counts import Counts
from placement.fleet import Fleet
from placement.grid import Grid
from placement.placer import place
from placement.plan import Copy, Plan
from placement.problem import Assignment, Demand, Problem
from placement.reasons import unit_reasons, whole_reason
from placement.settings import RoundSettings
from placement.unit import Unit
from placement.views import LoadView, ReplicaView
from placement.wish import Wish, Wishes

_ALIKE = 0.02
"""Shares that differ by less are not worth a new plan."""

Residency = dict[str, list[Copy]]


class Round:
    """Plans for one model."""

    def __init__(
        self,
        units: Sequence[Unit],
        layers: Sequence[int],
        experts: int,
        slice_bytes: int,
        settings: RoundSettings,
        *,
        last: Plan | None = None,
    ) -> None:
        """`layers` are the numbers of the MoE layers; go on from the `last` plan, where there is one."""
        self._grid = Grid.of(units, layers, experts)
        self._bytes = slice_bytes
        self._last = last
        self._demand: Demand | None = None
        asked = last.replicas if last else {}
        self._counts = Counts(np.array([asked.get(unit.name, settings.replicas) for unit in units], dtype=np.int64))
        self.use(settings)

    def use(self, settings: RoundSettings) -> None:
        """Plan by these settings from the next round on."""
        self._settings = settings
        self._wishes = Wishes(self._grid, self._bytes, settings)

    def decide(self, load: LoadView, replicas: Sequence[ReplicaView], inline: Speed) -> Plan:
        """The plan for now; the last one itself where nothing changed that matters.

        `inline` is a gateway's speed. Raise ProblemError where the method can't do with its memory.
        """
        settings, grid = self._settings, self._grid
        quiet = not (load.rows.any() and load.steps_per_s > 0)
        if not quiet:
            self._demand = _demand(load, settings)
        demand = self._demand or _unknown(load)
        planned = (self._last.copies if self._last else None) or {}
        fleet = Fleet(grid, replicas, planned, self._bytes, settings, inline)
        idle = load.idle_s >= settings.idle_to_zero_s
        wish = self._wishes.wish(demand, fleet, idle=idle, now=self._counts.now)
        idle_s = grid.least(load.idle_s)
        idle_s[(idle_s < settings.idle_to_zero_s) | (not settings.elastic)] = np.nan
        counts = self._follow(load.now_s, wish, ~np.isnan(idle_s), hold=quiet and settings.elastic)
        reasons = unit_reasons(grid, demand, wish, counts, idle_s, settings)
        kept = fleet.oldest(counts)
        problem = kept.problem(demand)
        decided = static(problem) if settings.method == "static" else _place(problem, wish, kept.counts[grid.unit])
        reason = whole_reason(grid, problem, decided, counts, settings, quiet=quiet)
        return self._publish(load.now_s, counts, self._residency(decided, fleet, kept), reason, reasons)

    def _follow(self, now_s: float, wish: Wish, idle: Bools, *, hold: bool) -> Ints:
        """[U] replicas from now on. Where nothing runs they `hold`, until their unit has been `idle` [U] for long."""
        wanted = np.where(idle, wish.least, self._counts.now if hold else wish.units)
        return self._counts.follow(
            now_s,
            wanted,
            least=wish.least,
            most=wish.most,
            worth=wish.relief > 1 + self._settings.placement.hysteresis,
            idle=idle,
            cool_down_s=self._settings.cool_down_s,
        )

    def _residency(self, decided: Assignment, fleet: Fleet, kept: Fleet) -> Residency:
        """Replica id -> its copies; a replica that gets nothing is named too."""
        named: Residency = {each.id: [] for each in fleet.replicas}
        ids, layers = [each.id for each in kept.replicas], self._grid.layers
        copies = decided.copies
        for layer, expert, device, share in zip(
            copies.layer.tolist(), copies.expert.tolist(), copies.device.tolist(), copies.share.tolist(), strict=True
        ):
            named[ids[device]].append(Copy(layers[layer], expert, share))
        return named

    def _publish(
        self, now_s: float, counts: Ints, copies: Residency | None, reason: str, reasons: dict[str, str]
    ) -> Plan:
        last = self._last
        asked = {unit.name: int(count) for unit, count in zip(self._grid.units, counts, strict=True)}
        if last is None or last.replicas != asked or not _alike(last.copies, copies):
            epoch = last.epoch + 1 if last else 1
            last = Plan(
                epoch=epoch,
                replicas=asked,
                copies=copies,
                levelled=self._settings.elastic,
                reason=reason,
                reasons=reasons,
                made_at=now_s,
            )
            self._last = last
        return last


def _demand(load: LoadView, settings: RoundSettings) -> Demand:
    """Rows of a step; at least one step is within the horizon."""
    steps = max(load.steps_per_s * load.horizon_s, 1.0)
    high = load.p90 if settings.headroom and settings.method != "oracle" else load.rows
    return Demand.of(load.rows / steps, high / steps, load.steps_per_s)


def _unknown(load: LoadView) -> Demand:
    """Before the first row: all slices are alike, and worth their memory."""
    return Demand.of(np.ones(load.rows.shape), steps_per_s=np.inf)


def _place(problem: Problem, wish: Wish, live: Ints) -> Assignment:
    """Copies on the replicas there are, `live` [L, E] of each slice's unit."""
    copies = np.minimum(wish.copies, live)
    if wish.scale is None:
        return moeless.place(problem, copies)
    return place(problem, dataclasses.replace(wish.scale, copies=copies), wish.placement)


def _alike(before: Mapping[str, Sequence[Copy]] | None, after: Mapping[str, Sequence[Copy]] | None) -> bool:
    """Whether the same replicas hold the same slices, with shares that differ little."""
    if before is None or after is None:
        return before is after
    return before.keys() == after.keys() and all(_near(before[each], after[each]) for each in before)


def _near(before: Sequence[Copy], after: Sequence[Copy]) -> bool:
    return len(before) == len(after) and all(
        (one.layer, one.expert) == (other.layer, other.expert)
        and abs(one.share - other.share) <= _ALIKE
        and (one.share > 0) == (other.share > 0)
        for one, other in zip(before, after, strict=True)
    )
