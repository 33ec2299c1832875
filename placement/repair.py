"""Relieving the busiest devices: in each layer from the busiest to the idlest, as long as it helps. Pure.

As PROBE's planner (arXiv 2602.00509), but with unlike devices, memory shared by all layers, and two ways to relieve: a
copy moves, or, where no copy of the right size is there, a slice is split by one more copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.arrays import Bools, Floats, Ints
from placement.filling import fill
from placement.problem import Problem
from placement.room import Cold
from placement.scaler import Scale
from placement.table import Table

_WORTH = 2e-3
_MOVE = 0.7
"""A move takes no memory: it is taken for this part of what a split would bring."""


@dataclass(frozen=True, eq=False, slots=True)
class _Relief:
    """What would be done in layers [A]: copy `column` of `origin` gives `seconds` to `device`."""

    layer: Ints
    column: Ints
    origin: Ints
    device: Ints
    seconds: Floats
    whole: Bools
    gain: Floats

    def where(self, chosen: Bools | Ints) -> _Relief:
        """Those that `chosen` names."""
        return _Relief(
            self.layer[chosen],
            self.column[chosen],
            self.origin[chosen],
            self.device[chosen],
            self.seconds[chosen],
            self.whole[chosen],
            self.gain[chosen],
        )


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


def repair(table: Table, problem: Problem, scaled: Scale, limits: Limits) -> None:
    """Relieve the busiest device of each layer until it is good enough, nothing helps or rounds and moves are spent."""
    layers = np.arange(table.layers)
    cold = None
    for _ in range(limits.rounds):
        level = table.level(layers)
        busy = np.where(level > table.call_s, level, 0.0)
        high = busy.max(axis=1, initial=0.0) > limits.goal[layers]
        layers, level, busy = layers[high], level[high], busy[high]
        if not len(layers) or table.moves >= limits.bound:
            return
        relief = _find(table, problem, scaled, limits, layers, level, np.argmax(busy, axis=1))
        layers = relief.layer
        if not len(layers):
            return
        roomy = table.free[relief.device] > 0
        if not roomy.all():
            cold = cold or Cold(table, problem, scaled, limits.goal, limits.least)
            _squeeze(table, relief.where(~roomy), cold, limits)
        _apply(table, _affordable(relief.where(roomy), table, limits.bound))


def _find(
    table: Table, problem: Problem, scaled: Scale, limits: Limits, layers: Ints, level: Floats, busiest: Ints
) -> _Relief:
    """The best relief of each layer that has one."""
    open_level = level
    if problem.bound:
        open_level = np.where(problem.devices.unit == problem.devices.unit[busiest][:, None], level, np.inf)
    idlest = np.argmin(open_level, axis=1)
    each = np.arange(len(layers))
    high, low = level[each, busiest], open_level[each, idlest]
    row, column = np.nonzero((table.device[layers] == busiest[:, None]) & np.isfinite(low)[:, None])
    layer = layers[row]
    part, expert = table.part[layer, column], table.expert[layer, column]
    slow_high, slow_low = 1 / table.speed[busiest[row]], 1 / table.speed[idlest[row]]
    high, low = high[row], low[row]
    elsewhere = ~table.held[layer, expert, idlest[row]]
    node = problem.devices.node
    stays = ~scaled.spread[layer, expert] | (node[busiest[row]] == node[idlest[row]])
    by_move = np.where(elsewhere & stays, high - np.maximum(high - part * slow_high, low + part * slow_low), 0.0)
    poured = np.minimum(part, (high - low) / (slow_high + slow_low))
    copies = table.copies[layer, expert]
    may_split = elsewhere & (copies < np.minimum(table.parts[layer, expert], limits.most))
    by_split = np.where(may_split, poured * slow_high, 0.0)
    by_split[by_split < limits.price] = 0.0
    whole = by_move >= _MOVE * by_split
    gain = np.where(whole, by_move, by_split)
    order = np.lexsort((column, -gain, row))
    first = order[np.unique(row[order], return_index=True)[1]]
    seconds = np.where(whole, part, poured)
    found = _Relief(layer, column, busiest[row], idlest[row], seconds, whole, gain).where(first)
    return found.where(found.gain > _WORTH * high[first])


def _affordable(relief: _Relief, table: Table, bound: int) -> _Relief:
    """Those that fit in the memory of their device and in the bound on moves; the most helpful first."""
    order = np.lexsort((-relief.gain, relief.device))
    device = relief.device[order]
    rank = np.arange(len(order)) - np.searchsorted(device, device)
    chosen = order[rank < table.free[device]]
    chosen = chosen[np.argsort(-relief.gain[chosen], kind="stable")][: max(0, bound - table.moves)]
    return relief.where(np.sort(chosen))


def _squeeze(table: Table, relief: _Relief, cold: Cold, limits: Limits) -> None:
    """Reliefs whose device is full: one a device, where something makes room for it."""
    if table.moves + 2 * len(relief.layer) > limits.bound:
        return
    relief = relief.where(np.unique(relief.device, return_index=True)[1])
    victims = cold.on(relief.device, relief.origin, relief.whole, relief.layer)
    relief, victims = relief.where(victims.found), victims.where(victims.found)
    layer, column = victims.layer, victims.column
    expert, lost = table.expert[layer, column], table.part[layer, column] > 0
    table.move(layer[victims.trade], column[victims.trade], relief.origin[victims.trade])
    table.drop(layer[~victims.trade], column[~victims.trade])
    _pour(table, layer[~victims.trade & lost], expert[~victims.trade & lost])
    _apply(table, relief.where(np.argsort(relief.layer, kind="stable")))


def _apply(table: Table, relief: _Relief) -> None:
    """Carry out what is still as it was found: room may have been made by one of these very copies."""
    same = table.device[relief.layer, relief.column] == relief.origin
    expert = table.expert[relief.layer, relief.column]
    relief = relief.where(same & ~table.held[relief.layer, expert, relief.device])
    moved, split = relief.where(relief.whole), relief.where(~relief.whole)
    table.move(moved.layer, moved.column, moved.device)
    if len(split.layer):
        expert = table.expert[split.layer, split.column]
        seconds = np.minimum(split.seconds, table.part[split.layer, split.column])
        table.part[split.layer, split.column] -= seconds
        table.add(split.layer, expert, split.device, seconds)
        _pour(table, split.layer, expert)


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
