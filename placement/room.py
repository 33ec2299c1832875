"""Where a copy could go in a full memory: who makes room for it. Pure.

Memory is one pool over all layers, so a slot that one layer needs may be held by what hardly needs it: by a spare copy
whose siblings have time for its rows, which is forgotten, or by a cold slice of another layer, which changes places
with the newcomer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from placement.arrays import Bools, Floats, Ints, rank_among
from placement.problem import Problem
from placement.scaler import Scale
from placement.table import Table

_Number = TypeVar("_Number", bound=np.generic)

_LOOK = 6
"""Copies of a device that are looked at: its coldest."""
_TRIES = 4
"""Full devices that are asked for room, the idlest first."""


@dataclass(frozen=True, eq=False, slots=True)
class Target:
    """Devices, their level once there is room, and who makes room; all of one shape, [A, K] or [R]."""

    device: Ints
    level: Floats
    """inf: none."""
    of: Ints
    victim: Ints
    """Layer and column of the copy that makes room; -1 where there is room."""
    trade: Bools
    """The victim goes where the newcomer is from; else it is forgotten."""

    @classmethod
    def roomy(cls, device: Ints, level: Floats) -> Target:
        """Devices that have room already."""
        none = np.full(device.shape, -1)
        return cls(device, level, none, none, np.zeros(device.shape, dtype=np.bool_))

    def and_lower(self, other: Target) -> Target:
        """[A, K] the lowest of both, the lowest first."""
        level = np.concatenate([self.level, other.level], axis=1)
        order = np.argsort(level, axis=1, kind="stable")[:, : self.device.shape[1]]

        def both(mine: NDArray[_Number], theirs: NDArray[_Number]) -> NDArray[_Number]:
            return np.take_along_axis(np.concatenate([mine, theirs], axis=1), order, axis=1)

        return Target(
            both(self.device, other.device),
            both(self.level, other.level),
            both(self.of, other.of),
            both(self.victim, other.victim),
            both(self.trade, other.trade),
        )

    def pick(self, row: Ints, rank: Ints) -> Target:
        """[R] the `rank`-th of each `row`."""
        at = (row, rank)
        return Target(self.device[at], self.level[at], self.of[at], self.victim[at], self.trade[at])


def lowest(values: Floats, count: int) -> Ints:
    """[A, count] where each row is lowest, the lowest first."""
    if count == 1:
        least: Ints = np.argmin(values, axis=1)[:, None]
        return least
    if count >= values.shape[1]:
        everything: Ints = np.argsort(values, axis=1, kind="stable")
        return everything
    some = np.sort(np.argpartition(values, count, axis=1)[:, :count], axis=1)
    order = np.argsort(np.take_along_axis(values, some, axis=1), axis=1, kind="stable")
    ordered: Ints = np.take_along_axis(some, order, axis=1)
    return ordered


class Spare:
    """Copies that could be forgotten: their siblings would take their seconds without passing the layer's goal."""

    def __init__(self, table: Table, scaled: Scale, goal: Floats, least: int | Ints) -> None:
        self._table, self._goal = table, goal
        self._least = np.pad(np.maximum(np.where(scaled.spread, 2, 1), least), ((0, 0), (0, 1)))

    def on(self, layers: Ints, level: Floats, full: Bools, count: int) -> Target:
        """[A, count] the full devices of each layer that would be lowest without a spare copy, each once."""
        table = self._table
        row, column = np.nonzero(np.append(full, False)[table.device[layers]])
        layer = layers[row]
        expert = table.expert[layer, column]
        spare = table.copies[layer, expert] > self._least[layer, expert]
        row, column, layer, expert = row[spare], column[spare], layer[spare], expert[spare]
        device, part = table.device[layer, column], table.part[layer, column]
        now = level[row, device]
        known = np.isfinite(now)
        room = np.where(known & (part > 0), np.maximum(self._goal[layer] - now, 0.0) * table.speed[device], 0.0)
        slices = row * table.experts + expert
        slack = np.bincount(slices, weights=room, minlength=len(layers) * table.experts)[slices] - room
        fits = np.flatnonzero(known & (slack >= part))
        without = (now - part / table.speed[device])[fits]
        best = np.full((len(layers), table.devices), np.inf)
        victim = np.full((len(layers), table.devices), -1)
        order = np.argsort(-without, kind="stable")  # the lowest of each device is written last
        best[row[fits[order]], device[fits[order]]] = without[order]
        victim[row[fits[order]], device[fits[order]]] = column[fits[order]]
        chosen = lowest(best, count)
        each = np.arange(len(layers))[:, None]
        of = np.broadcast_to(layers[:, None], chosen.shape)
        return Target(chosen, best[each, chosen], of, victim[each, chosen], np.zeros(chosen.shape, dtype=np.bool_))


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
        devices = lowest(level, min(_TRIES, table.devices))
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
