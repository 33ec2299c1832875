"""Where a copy could go in a full memory: who makes room for it. Pure.

Memory is one pool over all layers, so a slot that one layer needs may be held by what hardly needs it: by a spare copy
whose siblings have time for its rows, which is forgotten, or by a cold slice of another layer, which changes places with
the newcomer.
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


@dataclass(frozen=True, eq=False, slots=True)
class Target:
    """For each of some layers [A] a device, its level once there is room, and who makes room."""

    device: Ints
    level: Floats
    """inf: none."""
    of: Ints
    victim: Ints
    """Layer and column of the copy that makes room; -1 where there is room."""
    trade: Bools
    """The victim goes where the newcomer is from; else it is forgotten."""

    def or_lower(self, other: Target) -> Target:
        """Of two targets the lower one; this one where they are alike."""
        take = other.level < self.level * (1 - 1e-3)
        take |= np.isinf(self.level)
        pairs = zip(
            (self.device, self.level, self.of, self.victim, self.trade),
            (other.device, other.level, other.of, other.victim, other.trade),
            strict=True,
        )
        return Target(*(np.where(take, theirs, mine) for mine, theirs in pairs))


def no_target(device: Ints, level: Floats) -> Target:
    """Devices that have room already."""
    none = np.full(len(device), -1)
    return Target(device, level, none, none, np.zeros(len(device), dtype=np.bool_))


class Spare:
    """Copies that could be forgotten: their siblings would take their seconds without passing the layer's goal."""

    def __init__(self, table: Table, scaled: Scale, goal: Floats, least: int) -> None:
        self._table, self._goal = table, goal
        self._least = np.pad(np.maximum(np.where(scaled.spread, 2, 1), least), ((0, 0), (0, 1)))

    def on(self, layers: Ints, level: Floats, full: Bools) -> Target:
        """[A] the full device of each layer that would be lowest without its spare copy."""
        table = self._table
        expert, device, part = table.expert[layers], table.device[layers], table.part[layers]
        room = np.pad(np.maximum(self._goal[layers][:, None] - level, 0.0) * table.speed, ((0, 0), (0, 1)))
        each = np.arange(len(layers))[:, None]
        own = np.where(np.isfinite(room), room, 0.0)[each, device] * (part > 0)
        cells = (each * (table.experts + 1) + expert).reshape(-1)
        slack = np.bincount(cells, weights=own.reshape(-1), minlength=len(layers) * (table.experts + 1))
        siblings = slack.reshape(len(layers), table.experts + 1)[each, expert] - own
        rows = layers[:, None]
        spare = (table.copies[rows, expert] > self._least[rows, expert]) & (siblings >= part)
        spare &= np.append(full, False)[device]
        without = np.pad(level, ((0, 0), (0, 1)), constant_values=np.inf)[each, device]
        without = np.where(spare, without - part / np.append(table.speed, 1.0)[device], np.inf)
        victim = np.argmin(without, axis=1)
        each = each[:, 0]
        lowest = without[each, victim]
        return Target(
            np.minimum(device[each, victim], table.devices - 1), lowest, layers, victim, np.zeros(len(layers), dtype=np.bool_)
        )


class Cold:
    """The coldest copies of every device, as of one moment."""

    def __init__(self, table: Table, problem: Problem, scaled: Scale, goal: Floats, least: int) -> None:
        self._table, self._problem, self._scaled, self._goal = table, problem, scaled, goal
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

    def on(self, layers: Ints, device: Ints, level: Floats, source: Ints, everywhere: Floats) -> Target:
        """[A] full `device` of each layer, if a cold slice of another layer there may go to `source`.

        `everywhere` [L, D] are the levels of all layers.
        """
        table, scaled = self._table, self._scaled
        layer, column = self._layer[device], self._column[device]
        expert, part = table.expert[layer, column], table.part[layer, column]
        there = (layer >= 0) & (table.device[layer, column] == device[:, None]) & (layer != layers[:, None])
        node = self._problem.devices.node
        apart = scaled.spread[layer, np.minimum(expert, table.experts - 1)] & (node[device] != node[source])[:, None]
        then = everywhere[layer, source[:, None]] + part / table.speed[source][:, None]
        fits = there & (then <= self._goal[layer]) & ~apart & ~table.held[layer, expert, source[:, None]]
        choice = np.argmax(fits, axis=1)
        each = np.arange(len(device))
        found = fits[each, choice]
        return Target(
            device,
            np.where(found & np.isfinite(level), level, np.inf),
            layer[each, choice],
            np.where(found, column[each, choice], -1),
            found,
        )
