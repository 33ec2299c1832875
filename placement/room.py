"""Where a copy could go in a full memory: who makes room for it. Pure.

Memory is one pool over all layers, so a slot that one layer needs may be held by what hardly needs it: by a spare copy
whose siblings have time for its rows, which is forgotten, or by a cold slice of another layer, which changes places
with the newcomer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.arrays import Bools, Floats, Ints, rank_among
from placement.problem import Problem
from placement.scaler import Scale
from placement.table import Table

_LOOK = 6
"""Copies of a device that are looked at: its coldest."""
_TRIES = 4
"""Full devices that are asked for room, the idlest first."""


@dataclass(frozen=True, eq=False, slots=True)
class Target:
    """A device for each of some layers [R], its level once there is room, and who makes room."""

    device: Ints
    level: Floats
    """inf: none."""
    of: Ints
    victim: Ints
    """Layer and column of the copy that makes room; -1 where there is room."""
    trade: Bools
    """The victim goes where the newcomer is from; else it is forgotten."""

    @classmethod
    def roomy(cls, level: Floats) -> Target:
        """The lowest device by `level` [R, D], which has room."""
        device = np.argmin(level, axis=1)
        none = np.full(len(device), -1)
        return cls(device, level[np.arange(len(device)), device], none, none, np.zeros(len(device), dtype=np.bool_))

    def or_lower(self, other: Target) -> Target:
        """[R] the lower of both."""
        lower = other.level < self.level
        return Target(
            np.where(lower, other.device, self.device),
            np.where(lower, other.level, self.level),
            np.where(lower, other.of, self.of),
            np.where(lower, other.victim, self.victim),
            np.where(lower, other.trade, self.trade),
        )


class Spare:
    """Copies that could be forgotten: their siblings would take their seconds without passing the layer's goal."""

    def __init__(self, table: Table, scaled: Scale, goal: Floats, least: int | Ints) -> None:
        self._table, self._goal = table, goal
        self._least = np.pad(np.maximum(np.where(scaled.spread, 2, 1), least), ((0, 0), (0, 1)))

    def on(self, layers: Ints, level: Floats, full: Bools) -> Target:
        """[R] the full device of each layer that would be lowest by `level` [R, D] without a spare copy."""
        table = self._table
        low = np.pad(full & (level < self._goal[layers][:, None]), ((0, 0), (0, 1)))
        row, column = np.nonzero(np.take_along_axis(low, table.device[layers], axis=1))
        layer = layers[row]
        expert = table.expert[layer, column]
        spare = table.copies[layer, expert] > self._least[layer, expert]
        row, column, layer, expert = row[spare], column[spare], layer[spare], expert[spare]
        device, part = table.device[layer, column], table.part[layer, column]
        now = level[row, device]
        room = np.where(part > 0, (self._goal[layer] - now) * table.speed[device], 0.0)
        slices = row * table.experts + expert
        slack = np.bincount(slices, weights=room, minlength=len(layers) * table.experts)[slices] - room
        fits = np.flatnonzero(slack >= part)
        without = (now - part / table.speed[device])[fits]
        order = np.argsort(-without, kind="stable")  # the lowest of each row is written last
        fits, row = fits[order], row[fits[order]]
        lowest, at, victim = (np.full(len(layers), none) for none in (np.inf, 0, -1))
        lowest[row], at[row], victim[row] = without[order], device[fits], column[fits]
        return Target(at, lowest, layers, victim, np.zeros(len(layers), dtype=np.bool_))


class Cold:
    """The coldest copies of every device, as of one moment."""

    def __init__(self, table: Table, problem: Problem, scaled: Scale, goal: Floats) -> None:
        self._table, self._problem, self._scaled, self._goal = table, problem, scaled, goal
        layer, column = table.entries()
        device = table.device[layer, column]
        order = np.argsort(table.part[layer, column] / np.maximum(goal[layer], 1e-300))
        order = order[np.argsort(device[order].astype(np.uint16), kind="stable")]  # radix: few devices, many copies
        rank = rank_among(device[order])
        first, rank = order[rank < _LOOK], rank[rank < _LOOK]
        self._layer = np.full((table.devices, _LOOK), -1, dtype=np.int64)
        self._column = np.zeros((table.devices, _LOOK), dtype=np.int64)
        self._layer[device[first], rank] = layer[first]
        self._column[device[first], rank] = column[first]

    def on(self, layers: Ints, level: Floats, source: Ints, everywhere: Floats) -> Target:
        """[R] the idlest device of each layer by `level` [R, D] where a cold slice of another layer may go to `source`.

        `everywhere` [L, D] are the levels of all layers.
        """
        table, scaled = self._table, self._scaled
        devices = np.argsort(level, axis=1, kind="stable")[:, :_TRIES]
        each = np.arange(len(layers))
        layer, column = self._layer[devices], self._column[devices]  # [R, tries, look]
        expert, part = table.expert[layer, column], table.part[layer, column]
        device, to = devices[..., None], source[:, None, None]
        there = (layer >= 0) & (table.device[layer, column] == device) & (layer != layers[:, None, None])
        node = self._problem.devices.node
        apart = scaled.spread[layer, np.minimum(expert, table.experts - 1)] & (node[device] != node[to])
        then = everywhere[layer, to] + part / table.speed[to]
        fits = there & (then <= self._goal[layer]) & ~apart & ~table.held[layer, expert, to]
        fits &= np.isfinite(np.take_along_axis(level, devices, axis=1))[..., None]
        choice = np.argmax(fits.reshape(len(layers), -1), axis=1)
        which, nth = np.divmod(choice, _LOOK)
        found = fits[each, which, nth]
        device = devices[each, which]
        low = np.where(found, level[each, device], np.inf)
        return Target(device, low, layer[each, which, nth], np.where(found, column[each, which, nth], -1), found)
