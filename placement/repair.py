"""Relieving the busiest devices: a few of each layer at a time, as long as it helps. Pure.

PROBE's planner (arXiv 2602.00509) moves from the busiest device to the idlest. Here devices are unlike and memory is
one pool over all layers, often full; so there are three more ways: a slice is split by one more copy, a spare copy or a
cold slice makes room for the newcomer (`room.py`), or two copies change places (`swap.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.arrays import Bools, Floats, Ints, first_of_each, rank_among
from placement.problem import Problem
from placement.room import Cold, Spare, Target, lowest
from placement.scaler import Scale
from placement.swap import swap
from placement.table import Table

_AT_ONCE = 4
"""Devices of one layer that are relieved together."""
_WORTH = 5e-4
"""Less than this part of the busiest device's seconds is not worth a move."""
_ALIKE = 1e-3
"""Devices so close to the busiest are as busy."""
_MOVE = 0.7
"""A move takes no memory: it is taken for this part of what a split would bring."""


@dataclass(frozen=True, eq=False, slots=True)
class Limits:
    """Where repairing ends."""

    goal: Floats
    """[L] seconds that are good enough."""
    price: float
    """Seconds that a copy must save to be worth its memory."""
    bound: int
    """Copies that may be loaded in this round."""
    rounds: int
    room: int
    """Copies that there may be in all."""
    least: int | Ints
    """Copies that a slice keeps, where it has any."""


@dataclass(frozen=True, eq=False, slots=True)
class _Busy:
    """Devices to relieve [R], some of each layer, the busiest first, and their copies [M]."""

    layer: Ints
    device: Ints
    high: Floats
    """[R] their levels."""
    first: Bools
    """[R] the busiest of its layer."""
    row: Ints
    column: Ints


@dataclass(frozen=True, eq=False, slots=True)
class _Relief:
    """Copy `column` of row `row` gives `seconds` (or goes `whole`) to that row's target."""

    row: Ints
    column: Ints
    seconds: Floats
    whole: Bools


class Repair:
    """One placement's repairing."""

    def __init__(self, table: Table, problem: Problem, scaled: Scale, limits: Limits) -> None:
        self._table, self._problem, self._scaled, self._limits = table, problem, scaled, limits
        self._spare = Spare(table, scaled, limits.goal, limits.least)
        self._cold: Cold | None = None
        self._tired = np.zeros((table.layers, table.devices), dtype=np.bool_)

    def run(self) -> None:
        """Relieve until layers are good enough, nothing helps or rounds and moves are spent."""
        layers = np.arange(self._table.layers)
        for _ in range(self._limits.rounds):
            layers, level = self._high(layers)
            if not len(layers) or self._left() < 1:
                return
            busy = self._busy(layers, level)
            relieved = self._relieve(busy, self._targets(busy, layers, level))
            hard = busy.first & ~relieved
            if hard.any():
                relieved |= self._relieve(busy, self._cold_targets(busy, hard))
                hard &= ~relieved
                relieved[hard] = self._swap(busy, hard)
            self._tired[busy.layer[relieved]] = False
            self._tired[busy.layer[hard & ~relieved], busy.device[hard & ~relieved]] = True
            self._pour_rest(busy, relieved)

    def _left(self) -> int:
        """Reliefs that the bound on moves allows: each may move two copies."""
        return max(0, self._limits.bound - self._table.moves) // 2

    def _used(self, level: Floats) -> Floats:
        return np.where(level > self._table.call_s, level, 0.0)

    def _high(self, layers: Ints) -> tuple[Ints, Floats]:
        """Those of `layers` that are not good enough and may be helped, and their levels."""
        level = self._table.level(layers)
        used = self._used(level)
        top = used.max(axis=1, initial=0.0)
        untried = ((used > top[:, None] * (1 - _ALIKE)) & ~self._tired[layers]).any(axis=1)
        high = (top > self._limits.goal[layers]) & untried
        return layers[high], level[high]

    def _busy(self, layers: Ints, level: Floats) -> _Busy:
        """The busiest devices of each layer.

        Water-filling makes equals: where a device can't be relieved, one that shares a slice with it may be. So of the
        busiest, those with most copies come first.
        """
        table = self._table
        used = np.where(self._tired[layers], 0.0, self._used(level))
        top = used.max(axis=1, keepdims=True)
        urgent = np.where(used > top * (1 - _ALIKE), top * (1 + table.crowd(layers)), used)
        count = min(_AT_ONCE, table.devices)
        some = lowest(-urgent, count)
        each = np.arange(len(layers))[:, None]
        high = used[each, some]
        chosen = high > self._limits.goal[layers][:, None]
        chosen[:, 0] = True
        row, rank = np.nonzero(chosen)
        device = some[row, rank]
        column_row, column = self._columns(layers[row], device)
        return _Busy(layers[row], device, level[row, device], rank == 0, column_row, column)

    def _columns(self, layer: Ints, device: Ints) -> tuple[Ints, Ints]:
        """Row and column of the copies on `device` [R] of `layer` [R]."""
        table = self._table
        asked = np.full((table.layers, table.devices + 1), -1, dtype=np.int64)
        asked[layer, device] = np.arange(len(layer))
        row = asked[np.arange(table.layers)[:, None], table.device]
        at, column = np.nonzero(row >= 0)
        return row[at, column], column

    def _targets(self, busy: _Busy, layers: Ints, level: Floats) -> Target:
        """[R] devices that would be lowest with the room they have or can make; another one for each row of a layer."""
        table, problem = self._table, self._problem
        at = np.searchsorted(layers, busy.layer)
        if problem.bound:  # targets are chosen for each row by itself: units differ
            unit = problem.devices.unit
            layers, level = busy.layer, np.where(unit == unit[busy.device][:, None], level[at], np.inf)
            at = np.arange(len(layers))
        rank = rank_among(at)
        roomy = np.where(table.free > 0, level, np.inf)
        device = lowest(roomy, min(_AT_ONCE, table.devices))
        target = Target.roomy(device, np.take_along_axis(roomy, device, axis=1))
        full = table.free <= 0
        if full.any():
            target = target.and_lower(self._spare.on(layers, level, full, device.shape[1]))
        return target.pick(at, np.minimum(rank, device.shape[1] - 1) if not problem.bound else np.zeros_like(at))

    def _cold_targets(self, busy: _Busy, hard: Bools) -> Target:
        """[R] full devices, idle in the layer, where a cold slice of another layer makes room; for the `hard` rows."""
        table, problem = self._table, self._problem
        everywhere = table.level(np.arange(table.layers))
        if self._cold is None:
            self._cold = Cold(table, problem, self._scaled, self._limits.goal)
        level = np.where(hard[:, None] & (table.free <= 0), everywhere[busy.layer], np.inf)
        if problem.bound:
            level = np.where(problem.devices.unit == problem.devices.unit[busy.device][:, None], level, np.inf)
        return self._cold.on(busy.layer, level, busy.device, everywhere)

    def _relieve(self, busy: _Busy, target: Target) -> Bools:
        """Move or split one copy of each busy device to its target; [R] where that helped."""
        relief = self._affordable(self._best(busy, target), busy, target)
        done = np.zeros(len(busy.layer), dtype=np.bool_)
        done[relief.row] = True
        self._apply(relief, busy, target)
        return done

    def _best(self, busy: _Busy, target: Target) -> _Relief:
        """The best relief of each row that has one."""
        table, scaled, limits = self._table, self._scaled, self._limits
        known = np.isfinite(target.level)[busy.row] & self._there(busy)
        row, column = busy.row[known], busy.column[known]
        layer, source, to = busy.layer[row], busy.device[row], target.device[row]
        part, expert = table.part[layer, column], table.expert[layer, column]
        high, low = busy.high[row], target.level[row]
        slow_high, slow_low = 1 / table.speed[source], 1 / table.speed[to]
        node = self._problem.devices.node
        elsewhere = ~table.held[layer, expert, to]
        stays = ~scaled.spread[layer, expert] | (node[source] == node[to])
        by_move = np.where(elsewhere & stays, high - np.maximum(high - part * slow_high, low + part * slow_low), 0.0)
        poured = np.minimum(part, np.maximum(high - low, 0.0) / (slow_high + slow_low))
        may_split = elsewhere & (table.copies[layer, expert] < scaled.parts[layer, expert])
        by_split = np.where(may_split & ~target.trade[row], poured * slow_high, 0.0)
        by_split[by_split < limits.price] = 0.0
        whole = by_move >= _MOVE * by_split
        gain = np.where(whole, by_move, by_split)
        order = np.lexsort((column, -gain, row))
        first = order[first_of_each(row[order])]
        first = first[gain[first] > _WORTH * high[first]]
        return _Relief(row[first], column[first], np.where(whole, part, poured)[first], whole[first])

    def _affordable(self, relief: _Relief, busy: _Busy, target: Target) -> _Relief:
        """Reliefs that fit in the free memory and the moves left; none touches a slice that another one touches."""
        table, experts = self._table, self._table.experts + 1
        layer = busy.layer[relief.row]
        device, of, victim = target.device[relief.row], target.of[relief.row], target.victim[relief.row]
        fits = np.where(victim >= 0, 1, table.free[device]) > rank_among(device)
        helped = layer * experts + table.expert[layer, relief.column]
        fits &= rank_among(helped) == 0
        given_up = np.where(victim >= 0, of * experts + table.expert[of, victim], -1 - np.arange(len(of)))
        fits &= (rank_among(given_up) == 0) & ~np.isin(given_up, helped)
        more = fits & ~relief.whole & (victim < 0)
        fits &= ~more | (np.cumsum(more) <= self._limits.room - table.total)
        chosen = np.flatnonzero(fits)[: self._left()]
        return _Relief(relief.row[chosen], relief.column[chosen], relief.seconds[chosen], relief.whole[chosen])

    def _apply(self, relief: _Relief, busy: _Busy, target: Target) -> None:
        """Make room where it must be made, then move and split."""
        table, row, column = self._table, relief.row, relief.column
        victim = row[target.victim[row] >= 0]
        if len(victim):
            self._evict(target, victim, busy.device[victim])
        layer, to = busy.layer[row], target.device[row]
        expert = table.expert[layer, column]
        moved, split = relief.whole, ~relief.whole
        table.move(layer[moved], column[moved], to[moved])
        seconds = np.minimum(relief.seconds, table.part[layer, column])[split]
        table.part[layer[split], column[split]] -= seconds
        table.add(layer[split], expert[split], to[split], seconds)
        table.pour(layer[split], expert[split])

    def _evict(self, target: Target, row: Ints, source: Ints) -> None:
        table = self._table
        layer, column, trade = target.of[row], target.victim[row], target.trade[row]
        expert, lost = table.expert[layer, column], table.part[layer, column] > 0
        table.move(layer[trade], column[trade], source[trade])
        table.drop(layer[~trade], column[~trade])
        table.pour(layer[~trade & lost], expert[~trade & lost])

    def _swap(self, busy: _Busy, hard: Bools) -> Bools:
        kept = hard[busy.row] & self._there(busy)
        row = (np.cumsum(hard) - 1)[busy.row[kept]]
        where = (busy.layer[hard], busy.device[hard], row, busy.column[kept])
        return swap(self._table, self._problem, self._scaled, where, worth=_WORTH, most=self._left())

    def _there(self, busy: _Busy) -> Bools:
        """[M] which copies are still on their busy device."""
        there: Bools = self._table.device[busy.layer[busy.row], busy.column] == busy.device[busy.row]
        return there

    def _pour_rest(self, busy: _Busy, relieved: Bools) -> None:
        """Let the shared slice that a relieved device gets most of follow."""
        table = self._table
        layer = busy.layer[busy.row]
        expert, part = table.expert[layer, busy.column], table.part[layer, busy.column]
        known = np.minimum(expert, table.experts - 1)
        shared = relieved[busy.row] & (part > 0) & (part < table.work[layer, known] * (1 - 1e-9))
        shared &= self._there(busy)
        row, layer, expert, part = busy.row[shared], layer[shared], expert[shared], part[shared]
        order = np.lexsort((-part, row))
        first = order[first_of_each(row[order])]
        first = first[rank_among(layer[first] * table.experts + expert[first]) == 0]
        table.pour(layer[first], expert[first])
