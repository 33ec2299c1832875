"""Room on a full device: what it holds to the least use goes. Pure.

Memory is one pool over all layers, so a slot that one layer needs may be taken by another that hardly needs it: by a
spare copy that gets few rows, which is forgotten, or by a cold slice, which changes places with the copy to come.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.arrays import Bools, Floats, Ints
from placement.problem import Problem
from placement.scaler import Scale
from placement.table import Table

_LOOK = 6
"""Copies of a device that are looked at: its coldest."""
_SPARE = 0.15
"""A spare copy may be forgotten while it gets at most this part of its layer's goal."""


@dataclass(frozen=True, eq=False, slots=True)
class Victims:
    """For each of some full devices [M] the copy that makes room, if there is one."""

    found: Bools
    layer: Ints
    column: Ints
    trade: Bools
    """It must go where the newcomer is from; else it is forgotten."""

    def where(self, chosen: Bools | Ints) -> Victims:
        """Those that `chosen` names."""
        return Victims(self.found[chosen], self.layer[chosen], self.column[chosen], self.trade[chosen])


class Cold:
    """The coldest copies of every device, as of one moment."""

    def __init__(self, table: Table, problem: Problem, scaled: Scale, goal: Floats, least: int) -> None:
        self._table, self._problem, self._scaled, self._goal = table, problem, scaled, goal
        self._least = np.maximum(np.where(scaled.spread, 2, 1), least)
        layer, column = table.entries()
        device = table.device[layer, column]
        order = np.lexsort((table.part[layer, column] / np.maximum(goal[layer], 1e-300), device))
        counts = np.bincount(device, minlength=table.devices)
        rank = np.arange(len(order)) - (np.cumsum(counts) - counts)[device[order]]
        first = order[rank < _LOOK]
        self._layer = np.full((table.devices, _LOOK), -1, dtype=np.int64)
        self._column = np.zeros((table.devices, _LOOK), dtype=np.int64)
        self._layer[device[first], rank[rank < _LOOK]] = layer[first]
        self._column[device[first], rank[rank < _LOOK]] = column[first]

    def on(self, device: Ints, origin: Ints, whole: Bools, newcomer: Ints) -> Victims:
        """Who makes room on each `device` [M] for a copy of layer `newcomer` that comes (`whole`: away) from `origin`."""
        table, scaled = self._table, self._scaled
        layer, column = self._layer[device], self._column[device]
        expert, part = table.expert[layer, column], table.part[layer, column]
        there = (layer >= 0) & (table.device[layer, column] == device[:, None])
        known = np.minimum(expert, table.experts - 1)
        goal = self._goal[layer]
        spare = there & (table.copies[layer, expert] > self._least[layer, known]) & (part <= _SPARE * goal)
        level = table.level(np.arange(table.layers))[layer, origin[:, None]]
        node = self._problem.devices.node
        apart = scaled.spread[layer, known] & (node[device] != node[origin])[:, None]
        fits = level + part / table.speed[origin][:, None] <= goal
        trade = there & whole[:, None] & fits & ~apart & ~table.held[layer, expert, origin[:, None]]
        trade &= layer != newcomer[:, None]
        choice = np.argmax(spare * 2 + trade, axis=1)
        each = np.arange(len(device))
        spare, trade = spare[each, choice], trade[each, choice]
        return Victims(spare | trade, layer[each, choice], column[each, choice], ~spare)
