"""The placer's working table: a row of copies for each layer, so that a step works on all layers at once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from placement.arrays import Floats, Ints
from placement.filling import active, fill
from placement.problem import Copies, Problem
from placement.scaler import Scale

_POURS = 6
_SETTLED = 1e-3


class Table:
    """Copies as [L, N] columns; a hole has expert E and device D, which no slice and no device have."""

    def __init__(self, problem: Problem, scaled: Scale, held: Copies) -> None:
        self.layers, self.experts, self.devices = problem.shape
        self.call_s, self.speed, self.slots = problem.devices.call_s, problem.devices.speed, problem.slots
        self.work, self.parts = scaled.work, scaled.parts
        self._reads = bool(scaled.least.any())
        self._least = np.pad(scaled.least, ((0, 0), (0, 1)))
        width = int(np.bincount(held.layer, minlength=1).max()) + 16
        self.expert = np.full((self.layers, width), self.experts, dtype=np.int64)
        self.device = np.full((self.layers, width), self.devices, dtype=np.int64)
        self.part = np.zeros((self.layers, width))
        """[L, N] seconds of its slice that a copy gets."""
        self.fresh = np.zeros((self.layers, width), dtype=np.bool_)
        """[L, N] copies that are not resident yet: they may change their device for nothing."""
        self.used = np.zeros((self.layers, width), dtype=np.bool_)
        """[L, N] copies that got rows so far."""
        self.moves = 0
        self.held = np.zeros((self.layers, self.experts + 1, self.devices + 1), dtype=np.bool_)
        """[L, E + 1, D + 1] which devices have a copy of which slice."""
        self.copies = np.zeros((self.layers, self.experts + 1), dtype=np.int64)
        self._end = np.zeros(self.layers, dtype=np.int64)
        self._used = np.zeros(self.devices, dtype=np.int64)
        self.add(held.layer, held.expert, held.device, held.share * self.work[held.layer, held.expert], fresh=False)
        self.used = self.part > 0

    @property
    def free(self) -> Ints:
        """[D] slices that still fit."""
        free: Ints = self.slots - self._used
        return free

    @property
    def total(self) -> int:
        """Copies there are."""
        return int(self.copies.sum())

    def snapshot(self) -> tuple[NDArray[Any], ...]:
        """Where copies are and what they get, to come back to."""
        columns = (self.expert, self.device, self.part, self.fresh, self.used)
        return tuple(column.copy() for column in columns)

    def restore(self, before: tuple[NDArray[Any], ...]) -> None:
        """Come back to a snapshot."""
        self.expert, self.device, self.part, self.fresh, self.used = before
        layer, column = self.entries()
        self._end = np.full(self.layers, self.expert.shape[1])
        self.moves = int(self.fresh.sum())
        self.held[:], self.copies[:], self._used[:] = False, 0, 0
        self._note(layer, self.expert[layer, column], self.device[layer, column], 1)

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
        self.part[layer, column], self.fresh[layer, column], self.used[layer, column] = 0.0, False, False

    def move(self, layer: Ints, column: Ints, device: Ints) -> None:
        """Copies to another device, with what they get."""
        expert = self.expert[layer, column]
        self._note(layer, expert, self.device[layer, column], -1)
        self._note(layer, expert, device, 1)
        self.moves += int((~self.fresh[layer, column]).sum())
        self.device[layer, column], self.fresh[layer, column], self.used[layer, column] = device, True, False

    def entries(self) -> tuple[Ints, Ints]:
        """Layer and column of all copies."""
        layer, column = np.nonzero(self.device < self.devices)
        return layer, column

    def level(self, layers: Ints) -> Floats:
        """[A, D] when each device would be done with each of the `layers` [A]: its call and its seconds."""
        cells = np.arange(len(layers))[:, None] * (self.devices + 1) + self.device[layers]
        size = len(layers) * (self.devices + 1)
        part = self.part[layers]
        if self._reads:
            part = np.where(part > 0, np.maximum(part, self._least[layers[:, None], self.expert[layers]]), 0.0)
        seconds = np.bincount(cells.reshape(-1), weights=part.reshape(-1), minlength=size)
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

    def evenly(self, copies: Ints) -> Floats:
        """[L, N] what each copy would get if there were `copies` [L, E] of each slice that share evenly."""
        part = np.pad(self.even(copies), ((0, 0), (0, 1)))
        return np.take_along_axis(part, self.expert, axis=1)

    def share(self, goal: Floats) -> None:
        """All rows to the copies there are: as so far where a slice got no new one, else evenly; then water-filling."""
        cells = np.arange(self.layers)[:, None] * (self.experts + 1) + self.expert
        size = self.copies.size
        total = np.bincount(cells.reshape(-1), weights=self.part.reshape(-1), minlength=size)
        new = np.bincount(cells.reshape(-1), weights=(self.fresh & (self.part <= 0)).reshape(-1), minlength=size)
        known = (total > 0) & (new == 0)
        scale = np.pad(self.work, ((0, 0), (0, 1))).reshape(-1) / np.where(known, total, 1.0)
        even = self.evenly(self.copies[:, :-1])
        self.part = np.where(known[cells], self.part * scale[cells], even)
        self._reserve(even)
        self.settle(goal)

    def _reserve(self, even: Floats) -> None:
        """Of a slice with more copies than may share its rows, only some get any, `even` parts.

        First those that do so far; then, in layers where that is faster, those that would be done first.
        """
        layer, column = self.entries()
        slices = layer * self.experts + self.expert[layer, column]
        parts = self.parts.reshape(-1)
        over = (self.copies[:, :-1].reshape(-1) > parts)[slices]
        if not over.any():
            return
        layer, column, slices = layer[over], column[over], slices[over]
        device, part = self.device[layer, column], even[layer, column]
        own = part / self.speed[device]
        using = active(slices, len(parts), np.where(self.used[layer, column], -1.0, own), parts)
        self.part[layer, column] = np.where(using, part, 0.0)
        every = np.arange(self.layers)
        level = self.level(every)
        others = level[layer, device] - np.where(using, own, 0.0)
        self.part[layer, column] = np.where(active(slices, len(parts), others + own, parts), part, 0.0)
        slower = _top(self.level(every), self.call_s) >= _top(level, self.call_s)
        back = slower[layer]
        self.part[layer[back], column[back]] = np.where(using, part, 0.0)[back]

    def settle(self, goal: Floats) -> None:
        """Water-filling from the shares as they are, until the busiest devices of layers above their `goal` [L] settle.

        All slices take a step towards their own water level at once: a small one where many meet on a device. Never for
        the worse.
        """
        going = _top(self.level(np.arange(self.layers)), self.call_s) > goal
        layer, column = np.nonzero((self.part > 0) & going[:, None])
        slices = layer * self.experts + self.expert[layer, column]
        cell = layer * self.devices + self.device[layer, column]
        part, work, cells = self.part[layer, column], self.work.reshape(-1), self.layers * self.devices
        shared = np.bincount(slices, minlength=self.work.size)[slices] > 1
        if not shared.any():
            return
        fixed = np.bincount(cell[~shared], weights=part[~shared], minlength=cells)
        layer, column, slices, cell, own = (given[shared] for given in (layer, column, slices, cell, part))
        most = np.ones(self.work.size, dtype=np.int64)
        np.maximum.at(most, slices, np.bincount(cell, minlength=cells)[cell])
        damping = 1 / most
        speed, call_s = np.tile(self.speed, self.layers), np.tile(self.call_s, self.layers)
        read = self._least[:, :-1].reshape(-1)
        least = np.full(self.layers, np.inf)
        for _ in range(_POURS):
            taken = np.maximum(own, read[slices] * (own > 0)) if self._reads else own
            seconds = fixed + np.bincount(cell, weights=taken, minlength=cells)
            top = (seconds / speed + call_s * (seconds > 0)).reshape(self.layers, -1).max(axis=1)
            better = (top < least)[layer]
            self.part[layer[better], column[better]] = own[better]
            going &= (top < least * (1 - _SETTLED)) & (top > goal)
            if not going[layer].any():
                return
            least = np.minimum(top, least)
            kept = going[layer]
            if not kept.all():
                layer, column, slices, cell = layer[kept], column[kept], slices[kept], cell[kept]
                own, taken = own[kept], taken[kept]
            aim = fill(work, slices, call_s[cell] + (seconds[cell] - taken) / speed[cell], speed[cell])
            own = np.where(aim > 0, own + damping[slices] * (aim - own), 0.0)
            own *= work[slices] / np.bincount(slices, weights=own, minlength=len(work))[slices]

    def pour(self, layers: Ints, expert: Ints) -> None:
        """Exact water-filling of some slices, each for itself."""
        if not len(layers):
            return
        chosen, at = np.unique(layers, return_inverse=True)
        cell = np.zeros((len(chosen), self.experts + 1), dtype=np.int64)
        cell[at, expert] = np.arange(1, len(layers) + 1)
        group = np.take_along_axis(cell, self.expert[chosen], axis=1)
        at, column = np.nonzero((group > 0) & (self.part[chosen] > 0))
        layer, group = chosen[at], group[at, column] - 1
        device = self.device[layer, column]
        taken = np.maximum(self.part[layer, column], self._least[layer, self.expert[layer, column]])
        base = self.level(chosen)[at, device] - taken / self.speed[device]
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
        self.used = _wider(self.used, more, False)


def _top(level: Floats, call_s: Floats) -> Floats:
    """[L] the busiest device of each layer."""
    top: Floats = np.where(level > call_s, level, 0.0).max(axis=1, initial=0.0)
    return top


def _wider(column: NDArray[Any], more: int, hole: float) -> NDArray[Any]:
    return np.pad(column, ((0, 0), (0, more)), constant_values=hole)
