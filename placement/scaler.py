"""How many copies each slice should have: by falling marginal gain, over all layers at once. Pure.

A layer takes as long as its busiest device. One more copy of a layer's hottest slice lowers that time until splitting
no longer helps: at the layer's mean, or where a part would read the weights again for too few rows. These gains differ
by layer, so memory goes where a copy saves the most seconds (as CRAFT's knapsack, arXiv 2603.28768), whole convex
pieces of each layer's curve at a time: with more memory no layer is planned slower.

Slices that are worth less than what keeping them costs get no copy at all: gateways compute them inline.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.arrays import Bools, Floats, Ints
from placement.problem import Problem, copy_counts
from placement.settings import GIB, PlacementSettings
from placement.work import most_parts, work_seconds

_HALVINGS = 30
_FINE = 0.4
"""Copies are split down to this part of the layer's mean ..."""
_GRAIN = 0.15
"""... since packing leaves about this part of a copy's seconds on top of the mean."""


@dataclass(frozen=True, eq=False, slots=True)
class Scale:
    """The scaler's answer, in what it reasoned with."""

    copies: Ints
    """[L, E] copies of each slice; 0 is computed inline."""
    work: Floats
    """[L, E] seconds of a step on a device of speed 1."""
    parts: Ints
    """[L, E] copies that may share the rows; more are in reserve."""
    least: Floats
    """[L, E] seconds that each copy takes that gets any rows: its weights are read."""
    spread: Bools
    """[L, E] slices that should outlive the loss of a node."""
    target: Floats
    """[L] seconds of the largest copy that the layer's time allows."""


@dataclass(frozen=True, eq=False, slots=True)
class _Curves:
    """What each further copy would bring: `time[l, k]` seconds of layer l after k more copies."""

    time: Floats
    size: Floats
    """[L, k] seconds of the layer's largest copy then."""
    layer: Ints
    """[K] candidates in the order in which their layers would take them ..."""
    expert: Ints
    rank: Ints
    """... and their place in that order."""


def scale(problem: Problem, settings: PlacementSettings) -> Scale:
    """Copies of each slice within the memory of all devices together."""
    layers, _, devices = problem.shape
    room = room_for(problem, settings)
    most = np.clip(settings.max_copies, 1, max(1, devices))
    work = work_seconds(problem.speed, problem.demand.high)
    parts = most_parts(problem.speed, problem.demand.high, most)
    copies = _first_copies(problem, settings, room)
    spread = _spread(problem, settings, work, copies)
    copies += largest_first((spread & (copies == 1)).astype(np.int64), work, room - int(copies.sum()))
    curves = _curves(problem, work, parts, copies)
    taken = _take(curves, room - int(copies.sum()), copy_price(problem, settings))
    chosen = curves.rank < taken[curves.layer]
    np.add.at(copies, (curves.layer[chosen], curves.expert[chosen]), 1)
    target = curves.size[np.arange(layers), taken]
    least = np.minimum(work, problem.speed.read_s)
    return Scale(copies, work, parts, least, spread, target)


def keep_alive_s(problem: Problem, settings: PlacementSettings) -> float:
    """What one copy costs, in seconds of waiting a second."""
    return settings.gib_worth * problem.slice_bytes / GIB


def replicas_wanted(copies: Ints, unit: Ints, units: int) -> Ints:
    """[units] replicas for `copies` [L, E] of slices of each `unit` [L, E]: as many as its slice with most."""
    wanted = np.zeros(units, dtype=np.int64)
    np.maximum.at(wanted, unit.reshape(-1), copies.reshape(-1))
    return wanted


def room_for(problem: Problem, settings: PlacementSettings) -> int:
    """Copies that fit on the devices and in the memory for all of them."""
    room = int(problem.slots.sum())
    return room if settings.max_bytes is None else min(room, settings.max_bytes // problem.slice_bytes)


def copy_price(problem: Problem, settings: PlacementSettings) -> float:
    """Seconds of a step that a copy must save to be worth its memory."""
    steps = problem.demand.steps_per_s
    return keep_alive_s(problem, settings) / steps if steps > 0 else np.inf


def _first_copies(problem: Problem, settings: PlacementSettings, room: int) -> Ints:
    """One copy (or the operator's least) of whatever is worth keeping, the most valuable first while memory lasts."""
    layers, experts, devices = problem.shape
    inline = work_seconds(problem.inline, problem.demand.rows) * problem.demand.steps_per_s
    held = copy_counts(problem.resident, layers, experts) > 0
    bar = keep_alive_s(problem, settings) * np.where(held, 1 - settings.hysteresis, 1.0)
    wanted = np.where(inline >= bar, np.maximum(1, settings.min_copies), settings.min_copies)
    copies = np.minimum(wanted, np.minimum(settings.max_copies, devices)).astype(np.int64)
    first = largest_first(np.minimum(copies, 1), inline, room)
    return first + largest_first(np.maximum(copies - 1, 0) * first, inline, room - int(first.sum()))


def _spread(problem: Problem, settings: PlacementSettings, work: Floats, copies: Ints) -> Bools:
    """[L, E] slices that get copies on two nodes."""
    if settings.spread_above is None or len(np.unique(problem.devices.node)) < 2:
        return np.zeros(work.shape, dtype=np.bool_)
    hot = work > settings.spread_above * work.mean(axis=1, keepdims=True)
    spread: Bools = hot & (copies > 0) & (np.asarray(settings.max_copies) > 1)
    return spread


def largest_first(wanted: Ints, work: Floats, room: int) -> Ints:
    """[L, E] `wanted` cut to `room`: those of the slices with most `work` are kept."""
    if int(wanted.sum()) <= room:
        return wanted
    order = np.argsort(-work, axis=None, kind="stable")
    upto = np.minimum(np.cumsum(wanted.reshape(-1)[order]), max(0, room))
    flat = np.zeros(wanted.size, dtype=np.int64)
    flat[order] = np.diff(upto, prepend=0)
    return flat.reshape(wanted.shape)


def _curves(problem: Problem, work: Floats, parts: Ints, copies: Ints) -> _Curves:
    """What copies beyond `copies` would bring.

    A layer takes them in the order of the seconds that each copy of their slice has before: so these, sorted, are the
    layer's time. There are few above the floor, so they are listed one by one.
    """
    layers, experts = work.shape
    busy = np.where(copies > 0, work, 0.0)
    mean = busy.sum(axis=1) / max(float(problem.devices.speed.sum()), 1e-300)
    least = (busy / parts).max(axis=1, initial=0.0)  # of a slice that can't be split any more
    floor = np.maximum(mean * _FINE, least)
    start = np.minimum(copies, parts)
    above = np.floor(busy / np.maximum(floor, 1e-300)[:, None] * (1 - 1e-9)).astype(np.int64)
    count = np.where(copies > 0, np.clip(np.minimum(above, parts - 1) - start + 1, 0, None), 0).reshape(-1)
    slices = np.repeat(np.arange(layers * experts), count)
    nth = np.arange(len(slices)) - np.repeat(np.cumsum(count) - count, count)
    layer, expert = np.divmod(slices, experts)
    before = work[layer, expert] / (start[layer, expert] + nth)
    order = np.argsort(layer - before / (2 * before.max(initial=1e-300)))
    layer, expert, before = layer[order], expert[order], before[order]
    steps = np.bincount(layer, minlength=layers).astype(np.int64)
    rank = np.arange(len(layer)) - np.repeat(np.cumsum(steps) - steps, steps)
    size = np.repeat(floor[:, None], int(steps.max(initial=0)) + 1, axis=1)
    size[layer, rank] = before
    # where no copy may help, the layer stays at what its slices take as they are
    idle = steps == 0
    size[idle, 0] = (busy / np.maximum(start, 1)).max(axis=1, initial=0.0)[idle]
    return _Curves(np.maximum(size, mean[:, None] + _GRAIN * size), size, layer, expert, rank)


def _take(curves: _Curves, room: int, price: float) -> Ints:
    """[L] further copies of each layer that save the most seconds in `room`, each worth its `price`."""
    layers, width = curves.time.shape
    if room <= 0 or width == 1 or not np.isfinite(price):
        return np.zeros(layers, dtype=np.int64)
    ahead = np.arange(width, dtype=np.float64)

    def best(price: float) -> Ints:
        """[L] copies where time and price together are least: a corner of each layer's convex hull."""
        taken: Ints = np.argmin(curves.time + price * ahead, axis=1)
        return taken

    taken = best(price)
    if int(taken.sum()) <= room:
        return taken
    low, high = price, float(curves.time.max()) + price
    taken = best(high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried = best(middle)
        if int(tried.sum()) <= room:
            high, taken = middle, tried
        else:
            low = middle
    # the next pieces don't fit whole: of a part of them those copies count that bring something
    more = best(low) - taken
    taken = taken + np.diff(np.minimum(np.cumsum(more), room - int(taken.sum())), prepend=0)
    reached = curves.time[np.arange(layers), taken][:, None]
    fewest: Ints = np.argmax(curves.time <= reached * (1 + 1e-9), axis=1)
    return fewest
