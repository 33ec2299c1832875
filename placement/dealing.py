"""Missing copies onto devices: the largest first, each where it is done first. Pure."""

from __future__ import annotations

import numpy as np

from placement.arrays import Floats, Ints, rank_among
from placement.problem import Problem
from placement.table import Table

_ROUNDS = 48
_PARTS = 8
_GOLDEN = 0.6180339887498949
"""Its multiples, modulo one, are as far apart as can be."""


def deal(table: Table, problem: Problem, missing: Ints, given_up: Ints) -> None:
    """Place `missing` [L, E] copies; `given_up` [L, D] slots were freed by the same layer.

    What has no place is left out.

    First within quotas, since all layers are dealt at once from the same memory; then, one at a time, what they left.
    """
    so_far = table.part
    table.part = table.evenly(table.copies[:, :-1] + missing)
    quota = _quota(table, missing, given_up)
    if problem.bound:  # memory is not one pool: a hot slice's copies may stand in the way of a cold one's first
        first = np.minimum(missing, table.copies[:, :-1] == 0)
        _Queue(table, first).deal(table, problem, None, chunked=False)
        left = missing - first
    else:
        left = _Queue(table, missing).deal(table, problem, quota, chunked=True)
    if left.any():
        _Queue(table, left).deal(table, problem, None, chunked=False)
    table.part = np.zeros(table.part.shape)
    table.part[:, : so_far.shape[1]] = so_far


def _quota(table: Table, missing: Ints, given_up: Ints) -> Ints:
    """[L, D] copies that each layer may put on each device: what it gave up itself, and its part of the free memory.

    Free slots are cut in proportion to what each layer misses. Devices begin the cut at different points, so that what
    rounding takes from a layer on one device it gets on another.
    """
    needs = missing.sum(axis=1)
    own = np.where(needs[:, None] > 0, given_up, 0)
    free = np.maximum(table.free - own.sum(axis=0), 0)
    rest = np.maximum(needs - own.sum(axis=1), 0)
    upto = np.cumsum(rest) / max(int(rest.sum()), 1)
    phase = np.arange(table.devices) * _GOLDEN % 1.0
    cut = np.floor(upto[:, None] * free + phase * (1 - 1e-9) + 1e-9).astype(np.int64)
    quota: Ints = own + np.diff(cut, axis=0, prepend=0)
    return quota


class _Queue:
    """[L, K] each layer's missing copies by falling size."""

    def __init__(self, table: Table, missing: Ints) -> None:
        size = table.even(table.copies[:, :-1] + missing)
        order = np.argsort(-size, axis=1, kind="stable")
        counts = np.take_along_axis(missing, order, axis=1)
        needs = missing.sum(axis=1)
        layer = np.repeat(np.arange(table.layers), needs)
        column = np.arange(len(layer)) - (np.cumsum(needs) - needs)[layer]
        self.expert = np.full((table.layers, int(needs.max(initial=0))), table.experts, dtype=np.int64)
        self.expert[layer, column] = np.repeat(order.reshape(-1), counts.reshape(-1))
        self.size: Floats = np.take_along_axis(np.pad(size, ((0, 0), (0, 1))), self.expert, axis=1)

    def deal(self, table: Table, problem: Problem, quota: Ints | None, *, chunked: bool) -> Ints:
        """Deal a chunk at a time: its largest to the idlest device, and so on; [L, E] what found no place."""
        width = self.expert.shape[1]
        chunk = max(1, min(table.devices // _PARTS, -(-width // _ROUNDS))) if chunked else 1
        # of devices alike each layer begins with others: a device that is hot in all layers could never make room
        turn = np.add.outer(np.arange(table.layers) * _GOLDEN, np.arange(table.devices) * _GOLDEN**2 * 7) % 1.0
        level = table.level(np.arange(table.layers)) + turn * (1e-6 * self.size.max(initial=0.0))
        left = np.zeros((table.layers, table.experts + 1), dtype=np.int64)
        rows = np.arange(table.layers)[:, None]
        for start in range(0, width, chunk):
            expert, size = self.expert[:, start : start + chunk], self.size[:, start : start + chunk]
            barred = (quota if quota is not None else table.free) <= 0
            if chunk == 1:
                barred = barred | table.held[rows[:, 0], expert[:, 0], :-1]
                if problem.bound:
                    own = problem.unit[rows[:, 0], np.minimum(expert[:, 0], table.experts - 1)]
                    barred |= problem.devices.unit != own[:, None]
            reach = np.where(barred, np.inf, level + size.mean(axis=1, keepdims=True) / table.speed)
            to = _first(reach, expert.shape[1])
            fits = np.isfinite(np.take_along_axis(reach, to, axis=1)) & (expert < table.experts)
            fits &= ~table.held[rows, expert, to]
            if quota is None:
                fits[fits] = rank_among(to[fits]) < table.free[to[fits]]
            layer, device = np.nonzero(fits)[0], to[fits]
            table.add(layer, expert[fits], device, size[fits])
            level[layer, device] += size[fits] / table.speed[device]
            if quota is not None:
                quota[layer, device] -= 1
            np.add.at(left, (np.nonzero(~fits)[0], expert[~fits]), 1)
        return left[:, :-1]


def _first(reach: Floats, count: int) -> Ints:
    """[L, count] the devices that are done first."""
    if count == 1:
        lowest: Ints = np.argmin(reach, axis=1)[:, None]
        return lowest
    order: Ints = np.argsort(reach, axis=1, kind="stable")[:, :count]
    return order
