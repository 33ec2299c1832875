"""Relieving the busiest devices: in each layer one at a time, as long as it helps. Pure.

PROBE's planner (arXiv 2602.00509) moves from the busiest device to the idlest. Here devices are unlike and memory is one
pool over all layers, often full; so there are three more ways: a slice is split by one more copy, a spare copy or a cold
slice makes room for the newcomer (`room.py`), or two copies change places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.arrays import Bools, Floats, Ints
from placement.filling import fill
from placement.problem import Problem
from placement.room import Cold, Spare, Target, no_target
from placement.scaler import Scale
from placement.table import Table

_WORTH = 5e-4
"""Less than this part of the busiest device's seconds is not worth a move."""
_ALIKE = 1e-3
"""Devices so close to the busiest are as busy."""
_TRIES = 4
"""Full devices that are asked for room, the idlest first."""
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
    least: int
    most: int
    """Copies of one slice, where it has any."""


@dataclass(frozen=True, eq=False, slots=True)
class _Busy:
    """The layers [A] to relieve: their devices' levels [A, D], the busiest device, and its copies [M]."""

    layers: Ints
    level: Floats
    device: Ints
    row: Ints
    column: Ints

    def where(self, chosen: Bools) -> _Busy:
        """Only the layers that `chosen` [A] names."""
        kept = chosen[self.row]
        row = (np.cumsum(chosen) - 1)[self.row[kept]]
        return _Busy(self.layers[chosen], self.level[chosen], self.device[chosen], row, self.column[kept])


@dataclass(frozen=True, eq=False, slots=True)
class _Relief:
    """In layers [A], copy `column` gives `seconds` (or goes `whole`) to the target of `row`."""

    row: Ints
    layer: Ints
    column: Ints
    seconds: Floats
    whole: Bools


class Repair:
    """One placement's repairing."""

    def __init__(self, table: Table, problem: Problem, scaled: Scale, limits: Limits) -> None:
        self._table, self._problem, self._scaled, self._limits = table, problem, scaled, limits
        self._cold: Cold | None = None
        self._tired = np.zeros((table.layers, table.devices), dtype=np.bool_)

    def run(self) -> None:
        """Relieve until layers are good enough, nothing helps or rounds and moves are spent."""
        table, limits = self._table, self._limits
        layers = np.arange(table.layers)
        for _ in range(limits.rounds):
            busy = self._busy(layers)
            if not len(busy.layers) or table.moves + 2 > limits.bound:
                return
            relieved = self._relieve(busy, self._targets(busy))
            rest = busy.where(~relieved)
            if len(rest.layers):
                relieved[~relieved] = self._swap(rest)
            self._tired[busy.layers[relieved]] = False
            self._tired[busy.layers[~relieved], busy.device[~relieved]] = True
            self._pour_rest(busy.where(relieved))
            layers = busy.layers

    def _busy(self, layers: Ints) -> _Busy:
        """Those of `layers` that are not good enough, with one of their busiest devices that was not tried in vain.

        Water-filling makes equals: where a device can't be relieved, one that shares a slice with it may be. So those
        with most copies come first.
        """
        table = self._table
        level = table.level(layers)
        used = np.where(level > table.call_s, level, 0.0)
        top = used.max(axis=1, initial=0.0)
        alike = (used > top[:, None] * (1 - _ALIKE)) & ~self._tired[layers]
        device = np.argmax(alike * (1 + table.crowd(layers)), axis=1)
        high = (top > self._limits.goal[layers]) & alike[np.arange(len(layers)), device]
        layers, level, device = layers[high], level[high], device[high]
        row, column = np.nonzero(table.device[layers] == device[:, None])
        return _Busy(layers, level, device, row, column)

    def _pour_rest(self, busy: _Busy) -> None:
        """Let the shared slice that the relieved device gets most of follow."""
        table = self._table
        layer = busy.layers[busy.row]
        stayed = table.device[layer, busy.column] == busy.device[busy.row]
        row, column = busy.row[stayed], busy.column[stayed]
        layer = busy.layers[row]
        expert, part = table.expert[layer, column], table.part[layer, column]
        shared = (part > 0) & (part < table.work[layer, expert] * (1 - 1e-9))
        row, expert, part = row[shared], expert[shared], part[shared]
        order = np.lexsort((-part, row))
        first = order[np.unique(row[order], return_index=True)[1]]
        _pour(table, busy.layers[row[first]], expert[first])

    def _targets(self, busy: _Busy) -> Target:
        """[A] the device that would be lowest with the room it has or can make."""
        table, problem = self._table, self._problem
        level = busy.level
        if problem.bound:
            level = np.where(problem.devices.unit == problem.devices.unit[busy.device][:, None], level, np.inf)
        roomy = np.where(table.free > 0, level, np.inf)
        device = np.argmin(roomy, axis=1)
        each = np.arange(len(busy.layers))
        target = no_target(device, roomy[each, device])
        full = table.free <= 0
        if not full.any():
            return target
        spare = Spare(table, self._scaled, self._limits.goal, self._limits.least).on(busy.layers, level, full)
        target = target.or_lower(spare)
        if self._cold is None:
            self._cold = Cold(table, problem, self._scaled, self._limits.goal, self._limits.least)
        everywhere = table.level(np.arange(table.layers))
        level = np.where(full, level, np.inf)
        for _ in range(_TRIES):
            device = np.argmin(level, axis=1)
            target = target.or_lower(self._cold.on(busy.layers, device, level[each, device], busy.device, everywhere))
            level[each, device] = np.inf
        return target

    def _relieve(self, busy: _Busy, target: Target) -> Bools:
        """Move or split one copy of each busiest device to its target; [A] where that helped."""
        relief = self._best(busy, target)
        chosen = np.zeros(len(busy.layers), dtype=np.bool_)
        taken = self._affordable(relief, target)
        if not len(taken):
            return chosen
        self._apply(relief, taken, target, busy.device)
        chosen[relief.row[taken]] = True
        return chosen

    def _best(self, busy: _Busy, target: Target) -> _Relief:
        """The best relief of each layer that has one."""
        table, scaled, limits = self._table, self._scaled, self._limits
        known = np.isfinite(target.level)[busy.row]
        row, column = busy.row[known], busy.column[known]
        layer, source, to = busy.layers[row], busy.device[row], target.device[row]
        part, expert = table.part[layer, column], table.expert[layer, column]
        high, low = busy.level[row, source], target.level[row]
        slow_high, slow_low = 1 / table.speed[source], 1 / table.speed[to]
        node = self._problem.devices.node
        elsewhere = ~table.held[layer, expert, to]
        stays = ~scaled.spread[layer, expert] | (node[source] == node[to])
        by_move = np.where(elsewhere & stays, high - np.maximum(high - part * slow_high, low + part * slow_low), 0.0)
        poured = np.minimum(part, np.maximum(high - low, 0.0) / (slow_high + slow_low))
        may_split = elsewhere & (table.copies[layer, expert] < np.minimum(scaled.parts[layer, expert], limits.most))
        by_split = np.where(may_split & ~target.trade[row], poured * slow_high, 0.0)
        by_split[by_split < limits.price] = 0.0
        whole = by_move >= _MOVE * by_split
        gain = np.where(whole, by_move, by_split)
        order = np.lexsort((column, -gain, row))
        first = order[np.unique(row[order], return_index=True)[1]]
        first = first[gain[first] > _WORTH * high[first]]
        seconds = np.where(whole, part, poured)
        return _Relief(row[first], layer[first], column[first], seconds[first], whole[first])

    def _affordable(self, relief: _Relief, target: Target) -> Ints:
        """Which reliefs fit in the free memory, the moves left, and do without each other's copies."""
        device, victim = target.device[relief.row], target.victim[relief.row]
        order = np.argsort(device, kind="stable")
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - np.searchsorted(device[order], device[order])
        cold = target.trade[relief.row] | (victim >= 0)
        chosen = np.flatnonzero(np.where(cold, rank == 0, rank < self._table.free[device]))
        left = (self._limits.bound - self._table.moves) // 2
        return chosen[: max(0, left)]

    def _apply(self, relief: _Relief, taken: Ints, target: Target, source: Ints) -> None:
        """Make room where it must be made, then move and split what is still as it was found."""
        table = self._table
        row, layer, column = relief.row[taken], relief.layer[taken], relief.column[taken]
        with_victim = target.victim[row] >= 0
        if with_victim.any():
            self._evict(target, row[with_victim], source)
        expert, to = table.expert[layer, column], target.device[row]
        same = (table.device[layer, column] == source[row]) & ~table.held[layer, expert, to] & (table.free[to] > 0)
        whole = relief.whole[taken]
        moved, split = same & whole, same & ~whole
        table.move(layer[moved], column[moved], to[moved])
        seconds = np.minimum(relief.seconds[taken], table.part[layer, column])[split]
        table.part[layer[split], column[split]] -= seconds
        table.add(layer[split], expert[split], to[split], seconds)
        _pour(table, layer[split], expert[split])

    def _evict(self, target: Target, row: Ints, source: Ints) -> None:
        table = self._table
        layer, column, trade = target.of[row], target.victim[row], target.trade[row]
        expert, lost = table.expert[layer, column], table.part[layer, column] > 0
        table.move(layer[trade], column[trade], source[row][trade])
        table.drop(layer[~trade], column[~trade])
        _pour(table, layer[~trade & lost], expert[~trade & lost])

    def _swap(self, busy: _Busy) -> Bools:
        """Let one copy of each busiest device change places with a smaller one elsewhere; [A] where that helped."""
        table, node = self._table, self._problem.devices.node
        row, column = busy.row, busy.column
        layer, source = busy.layers[row], busy.device[row]
        part, expert = table.part[layer, column], table.expert[layer, column]
        other_expert, other_device = table.expert[layer], table.device[layer]
        less = part[:, None] - table.part[layer]
        level = np.pad(busy.level, ((0, 0), (0, 1)), constant_values=np.inf)
        speed = np.append(table.speed, 1.0)
        high = busy.level[row, source][:, None]
        after = np.maximum(high - less / speed[source][:, None], level[row[:, None], other_device] + less / speed[other_device])
        clear = ~table.held[layer[:, None], expert[:, None], other_device]
        clear &= ~table.held[layer[:, None], other_expert, source[:, None]]
        if self._scaled.spread.any():
            spread = np.pad(self._scaled.spread, ((0, 0), (0, 1)))
            either = spread[layer, expert][:, None] | spread[layer[:, None], other_expert]
            clear &= ~either | (node[source][:, None] == np.append(node, -1)[other_device])
        if self._problem.bound:
            unit = self._problem.devices.unit
            clear &= unit[source][:, None] == np.append(unit, -2)[other_device]
        after = np.where(clear, after, np.inf)
        partner = np.argmin(after, axis=1) if after.shape[1] else np.zeros(len(row), dtype=np.int64)
        best = after[np.arange(len(row)), partner]
        order = np.lexsort((best, row))
        first = order[np.unique(row[order], return_index=True)[1]]
        first = first[best[first] < high[first, 0] * (1 - _WORTH)]
        first = first[: max(0, (self._limits.bound - table.moves) // 2)]
        layer, column, partner = layer[first], column[first], partner[first]
        mine, theirs = table.device[layer, column], table.device[layer, partner]
        table.move(layer, column, theirs)
        table.move(layer, partner, mine)
        helped = np.zeros(len(busy.layers), dtype=np.bool_)
        helped[row[first]] = True
        return helped


def _pour(table: Table, layers: Ints, expert: Ints) -> None:
    """Exact water-filling of slice `expert` in each of `layers`."""
    if not len(layers):
        return
    row, column = np.nonzero((table.expert[layers] == expert[:, None]) & (table.part[layers] > 0))
    layer = layers[row]
    device = table.device[layer, column]
    speed = table.speed[device]
    base = table.level(layers)[row, device] - table.part[layer, column] / speed
    table.part[layer, column] = fill(table.work[layers, expert], row, base, speed)
