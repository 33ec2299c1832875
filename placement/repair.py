"""Relieving the busiest devices: one of each layer at a time, as long as it helps. Pure.

PROBE's planner (arXiv 2602.00509) moves from the busiest device to the idlest. Here devices are unlike and memory is
one pool over all layers, often full; so there are three more ways: a slice is split by one more copy, a spare copy or a
cold slice makes room for the newcomer (`room.py`), or two copies change places (`swap.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.arrays import Bools, Floats, Ints, first_of_each, rank_among
from placement.problem import Problem
from placement.room import Cold, Spare, Target
from placement.scaler import Scale
from placement.swap import swap
from placement.table import Table

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
    """A device to relieve in each of some layers [R], and the copies on them [M]."""

    layer: Ints
    device: Ints
    high: Floats
    """[R] their levels."""
    row: Ints
    column: Ints

    def only(self, chosen: Bools) -> _Busy:
        """Those of the devices that `chosen` [R] names."""
        kept = chosen[self.row]
        row = (np.cumsum(chosen) - 1)[self.row[kept]]
        return _Busy(self.layer[chosen], self.device[chosen], self.high[chosen], row, self.column[kept])


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
        self._level = table.level(np.arange(table.layers))
        self._tired = np.zeros((table.layers, table.devices), dtype=np.bool_)
        """[L, D] devices that nothing helped since the last relief of their layer."""

    def run(self) -> None:
        """Relieve until layers are good enough, nothing helps or rounds and moves are spent."""
        for _ in range(self._limits.rounds):
            layers = self._high()
            if not len(layers) or self._left() < 1:
                return
            busy = self._busy(layers)
            relieved = self._relieve(busy, self._targets(busy))
            if not relieved.all():
                relieved[~relieved] = self._make_room(busy.only(~relieved))
            self._tired[busy.layer[relieved]] = False
            self._tired[busy.layer[~relieved], busy.device[~relieved]] = True
            self._pour_rest(busy.only(relieved))

    def _look_again(self, layers: Ints) -> None:
        layers = np.unique(layers)
        self._level[layers] = self._table.level(layers)

    def _left(self) -> int:
        """Reliefs that the bound on moves allows: each may move two copies."""
        return max(0, self._limits.bound - self._table.moves) // 2

    def _used(self) -> Floats:
        """[L, D] levels of the devices that get rows."""
        return np.where(self._level > self._table.call_s, self._level, 0.0)

    def _high(self) -> Ints:
        """Layers that are not good enough and may be helped."""
        used = self._used()
        top = used.max(axis=1, initial=0.0)
        untried = ((used > top[:, None] * (1 - _ALIKE)) & ~self._tired).any(axis=1)
        return np.flatnonzero(untried & (top > self._limits.goal * (1 + _WORTH)))

    def _busy(self, layers: Ints) -> _Busy:
        """The busiest device of each layer.

        Water-filling makes equals: where a device can't be relieved, one that shares a slice with it may be. So of the
        busiest, the one with most copies comes first.
        """
        table = self._table
        used = np.where(self._tired[layers], 0.0, self._used()[layers])
        top = used.max(axis=1, keepdims=True)
        urgent = np.where(used > top * (1 - _ALIKE), 1 + table.crowd(layers), 0)
        device = np.argmax(urgent, axis=1)
        row, column = np.nonzero(table.device[layers] == device[:, None])
        return _Busy(layers, device, self._level[layers, device], row, column)

    def _targets(self, busy: _Busy) -> Target:
        """[R] the device that would be lowest with the room it has or can make."""
        full = self._table.free <= 0
        level = self._within_unit(busy)
        target = Target.roomy(np.where(full, np.inf, level))
        return target.or_lower(self._spare.on(busy.layer, level, full)) if full.any() else target

    def _cold_targets(self, busy: _Busy) -> Target:
        """[R] full devices, idle in the layer, where a cold slice of another layer makes room."""
        if self._cold is None:
            self._cold = Cold(self._table, self._problem, self._scaled, self._limits.goal)
        level = np.where(self._table.free <= 0, self._within_unit(busy), np.inf)
        return self._cold.on(busy.layer, level, busy.device, self._level)

    def _within_unit(self, busy: _Busy) -> Floats:
        """[R, D] levels of the devices that may hold what the busy ones do; inf of others."""
        level, unit = self._level[busy.layer], self._problem.devices.unit
        return np.where(unit == unit[busy.device][:, None], level, np.inf) if self._problem.bound else level

    def _make_room(self, busy: _Busy) -> Bools:
        """[R] where a cold slice elsewhere, or else two copies that change places, relieved a busy device."""
        relieved = self._relieve(busy, self._cold_targets(busy))
        if not relieved.all():
            relieved[~relieved] = self._swap(busy.only(~relieved))
        return relieved

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
        self._look_again(np.concatenate([layer, target.of[victim]]))

    def _evict(self, target: Target, row: Ints, source: Ints) -> None:
        table = self._table
        layer, column, trade = target.of[row], target.victim[row], target.trade[row]
        expert, lost = table.expert[layer, column], table.part[layer, column] > 0
        table.move(layer[trade], column[trade], source[trade])
        table.drop(layer[~trade], column[~trade])
        table.pour(layer[~trade & lost], expert[~trade & lost])

    def _swap(self, busy: _Busy) -> Bools:
        kept = self._there(busy)
        where = (busy.layer, busy.device, busy.row[kept], busy.column[kept])
        helped = swap(self._table, self._problem, self._scaled, where, worth=_WORTH, most=self._left())
        self._look_again(busy.layer[helped])
        return helped

    def _there(self, busy: _Busy) -> Bools:
        """[M] which copies are still on their busy device."""
        there: Bools = self._table.device[busy.layer[busy.row], busy.column] == busy.device[busy.row]
        return there

    def _pour_rest(self, busy: _Busy) -> None:
        """Let the shared slice that a relieved device gets most of follow."""
        table = self._table
        layer = busy.layer[busy.row]
        expert, part = table.expert[layer, busy.column], table.part[layer, busy.column]
        known = np.minimum(expert, table.experts - 1)
        shared = (part > 0) & (part < table.work[layer, known] * (1 - 1e-9)) & self._there(busy)
        row, layer, expert, part = busy.row[shared], layer[shared], expert[shared], part[shared]
        order = np.lexsort((-part, row))
        first = order[first_of_each(row[order])]
        table.pour(layer[first], expert[first])
        self._look_again(layer[first])
