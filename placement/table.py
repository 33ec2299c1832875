"""The placer's working table: every layer's copies in a row of their own, so that a step works on all layers at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from placement.arrays import Floats, Ints
from placement.filling import active, fill
from placement.problem import Copies, Problem
from placement.scaler import Scale

_POURS = 12
_SETTLED = 1e-3


class Table:
    """Copies as [L, N] columns; a hole has expert E and device D, which no slice and no device have."""

    def __init__(self, problem: Problem, scaled: Scale, held: Copies) -> None:
        self.layers, self.experts, self.devices = problem.shape
        self.call_s, self.speed, self.slots = problem.devices.call_s, problem.devices.speed, problem.slots
        self.work, self.parts = scaled.work, scaled.parts
        width = int(np.bincount(held.layer, minlength=1).max()) + 16
        self.expert = np.full((self.layers, width), self.experts, dtype=np.int64)
        self.device = np.full((self.layers, width), self.devices, dtype=np.int64)
        self.part = np.zeros((self.layers, width))
        """[L, N] seconds of its slice that a copy gets."""
        self.fresh = np.zeros((self.layers, width), dtype=np.bool_)
        """[L, N] copies that are not resident yet: they may change their device for nothing."""
        self.moves = 0
        self.held = np.zeros((self.layers, self.experts + 1, self.devices + 1), dtype=np.bool_)
        """[L, E + 1, D + 1] which devices have a copy of which slice."""
        self.copies = np.zeros((self.layers, self.experts + 1), dtype=np.int64)
        self._end = np.zeros(self.layers, dtype=np.int64)
        self._used = np.zeros(self.devices, dtype=np.int64)
        self.add(held.layer, held.expert, held.device, fresh=False)

    @property
    def free(self) -> Ints:
        """[D] slices that still fit."""
        free: Ints = self.slots - self._used
        return free

    def add(self, layer: Ints, expert: Ints, device: Ints, part: Floats | float = 0.0, *, fresh: bool = True) -> None:
        """New copies, sorted by layer."""
        counts = np.bincount(layer, minlength=self.layers)
        column = self._end[layer] + np.arange(len(layer)) - (np.cumsum(counts) - counts)[layer]
        self._widen(int(column.max(initial=0)) + 1)
        self.expert[layer, column], self.device[layer, column] = expert, device
        self.part[layer, column], self.fresh[layer, column] = part, fresh
        self._end += counts
        self._note(layer, expert, device, 1)
        self.moves += len(layer) if fresh else 0

    def drop(self, layer: Ints, column: Ints) -> None:
        """Forget copies; what they got is lost until it is poured anew."""
        self._note(layer, self.expert[layer, column], self.device[layer, column], -1)
        self.moves -= int(self.fresh[layer, column].sum())
        self.expert[layer, column], self.device[layer, column] = self.experts, self.devices
        self.part[layer, column], self.fresh[layer, column] = 0.0, False

    def move(self, layer: Ints, column: Ints, device: Ints) -> None:
        """Copies to another device, with what they get."""
        expert = self.expert[layer, column]
        self._note(layer, expert, self.device[layer, column], -1)
        self._note(layer, expert, device, 1)
        self.moves += int((~self.fresh[layer, column]).sum())
        self.device[layer, column], self.fresh[layer, column] = device, True

    def entries(self) -> tuple[Ints, Ints]:
        """Layer and column of all copies."""
        layer, column = np.nonzero(self.device < self.devices)
        return layer, column

    def level(self, layers: Ints) -> Floats:
        """[A, D] when each device would be done with each of the `layers` [A]: its call and its seconds."""
        cells = np.arange(len(layers))[:, None] * (self.devices + 1) + self.device[layers]
        size = len(layers) * (self.devices + 1)
        seconds = np.bincount(cells.reshape(-1), weights=self.part[layers].reshape(-1), minlength=size)
        level: Floats = self.call_s + seconds.reshape(len(layers), self.devices + 1)[:, :-1] / self.speed
        return level

    def crowd(self, layers: Ints) -> Ints:
        """[A, D] copies on each device in each of the `layers` [A]."""
        cells = np.arange(len(layers))[:, None] * (self.devices + 1) + self.device[layers]
        counts = np.bincount(cells.reshape(-1), minlength=len(layers) * (self.devices + 1))
        return counts.reshape(len(layers), self.devices + 1)[:, :-1].astype(np.int64)

    def even(self, copies: Ints) -> Floats:
        """[L, E] seconds of each copy where a slice is split evenly over so many `copies`."""
        part: Floats = self.work / np.clip(copies, 1, self.parts)
        return part

    def split_evenly(self, copies: Ints) -> None:
        """Give each copy an even part, as if there were `copies` [L, E] of each slice."""
        part = np.pad(self.even(copies), ((0, 0), (0, 1)))
        self.part = np.take_along_axis(part, self.expert, axis=1)

    def reserve(self) -> None:
        """Of a slice with more copies than may share its rows, only those on the idlest devices get any, evenly."""
        layer, column = self.entries()
        slices = layer * self.experts + self.expert[layer, column]
        parts = self.parts.reshape(-1)
        over = (self.copies[:, :-1].reshape(-1) > parts)[slices]
        if over.any():
            cell = layer * self.devices + self.device[layer, column]
            part = self.part[layer, column]
            seconds = np.bincount(cell, weights=part, minlength=self.layers * self.devices)
            base = self.call_s[self.device[layer, column]] + (seconds[cell] - part) / self.speed[self.device[layer, column]]
            using = active(slices[over], len(parts), base[over], parts)
            self.part[layer[over], column[over]] = np.where(using, part[over], 0.0)

    def settle(self) -> None:
        """Water-filling from the shares as they are, until the busiest devices settle; never for the worse.

        All slices take a step towards their own water level at once: a small one where many meet on a device.
        """
        layer, column = np.nonzero(self.part > 0)
        expert, device = self.expert[layer, column], self.device[layer, column]
        slices, cell, part = layer * self.experts + expert, layer * self.devices + device, self.part[layer, column]
        using = np.bincount(slices, minlength=self.work.size)
        shared = using[slices] > 1
        if not shared.any():
            return
        cells = self.layers * self.devices
        fixed = np.bincount(cell[~shared], weights=part[~shared], minlength=cells)
        layer, column, device, slices, cell = (given[shared] for given in (layer, column, device, slices, cell))
        group = np.unique(slices, return_inverse=True)[1]
        work = self.work.reshape(-1)[slices[np.unique(group, return_index=True)[1]]]
        most = np.zeros(len(work))
        np.maximum.at(most, group, np.bincount(cell, minlength=cells)[cell])
        damping = (1 / most)[group]
        speed, call_s = self.speed[device], self.call_s[device]
        own = best = part[shared]
        least = np.full(self.layers, np.inf)
        for _ in range(_POURS):
            seconds = fixed + np.bincount(cell, weights=own, minlength=cells)
            by_device = seconds.reshape(self.layers, -1)
            top = (by_device / self.speed + self.call_s * (by_device > 0)).max(axis=1)
            best = np.where((top < least)[layer], own, best)
            if not (top < least * (1 - _SETTLED)).any():
                break
            least = np.minimum(top, least)
            own = own + damping * (fill(work, group, call_s + (seconds[cell] - own) / speed, speed) - own)
        self.part[layer, column] = best

    def pour(self, layers: Ints, expert: Ints) -> None:
        """Exact water-filling of some slices, each for itself."""
        if not len(layers):
            return
        cell = np.zeros((self.layers, self.experts + 1), dtype=np.int64)
        cell[layers, expert] = np.arange(1, len(layers) + 1)
        group = cell[np.arange(self.layers)[:, None], self.expert]
        layer, column = np.nonzero((group > 0) & (self.part > 0))
        group = group[layer, column] - 1
        device = self.device[layer, column]
        chosen, at = np.unique(layer, return_inverse=True)
        base = self.level(chosen)[at, device] - self.part[layer, column] / self.speed[device]
        self.part[layer, column] = fill(self.work[layers, expert], group, base, self.speed[device])

    def _note(self, layer: Ints, expert: Ints, device: Ints, by: int) -> None:
        self.held[layer, expert, device] = by > 0
        np.add.at(self.copies, (layer, expert), by)
        self._used += by * np.bincount(device, minlength=self.devices)

    def _widen(self, width: int) -> None:
        have = self.expert.shape[1]
        if width <= have:
            return
        more = max(width - have, have // 2)
        self.expert, self.device = _wider(self.expert, more, self.experts), _wider(self.device, more, self.devices)
        self.part, self.fresh = _wider(self.part, more, 0), _wider(self.fresh, more, False)


def _wider(column: NDArray[Any], more: int, hole: float) -> NDArray[Any]:
    return np.pad(column, ((0, 0), (0, more)), constant_values=hole)
