"""Which devices hold which slices, and what part of the rows each copy gets. Pure.

Warm first: what is resident and still wanted stays. Missing copies go to the devices that would finish first
(`dealing.py`). Rows are shared by water-filling (`filling.py`). Then the busiest devices are relieved by moves that
help (`repair.py`). So few bytes move where loads drift, and none where the slowest device is within `imbalance` of what
is possible.
"""

from __future__ import annotations

import numpy as np

from placement.arrays import Ints, rank_among
from placement.dealing import deal
from placement.filling import lower_bound
from placement.problem import Assignment, Copies, Problem
from placement.repair import Limits, Repair
from placement.scaler import Scale, copy_price, largest_first, room_for, scale
from placement.settings import PlacementSettings
from placement.spreading import spread_out
from placement.table import Table

_TRIFLE = 1e-3
_WORTH = 5e-4
"""Moves that save less than this part of all layers' seconds stay undone."""


def plan(problem: Problem, settings: PlacementSettings) -> Assignment:
    """Scale and place: a whole round."""
    return place(problem, scale(problem, settings), settings)


def place(problem: Problem, scaled: Scale, settings: PlacementSettings) -> Assignment:
    """Copies near `scaled.copies` on devices, within their memory; few bytes from what is resident."""
    if not len(problem.devices):
        return Assignment.of(problem, Copies.none())
    table = Table(problem, scaled, _keepable(problem, scaled))
    limits = _limits(problem, scaled, settings)
    missing = _missing(table, scaled, settings, limits.bound)
    must = (missing > 0) & (table.copies[:, :-1] < _least(scaled, settings))
    table.share(limits.goal)
    stay, seconds = table.snapshot(), _seconds(table, limits)
    over = table.total > limits.room
    if missing.any() or over:
        deal(table, problem, missing, _make_room(table, scaled, missing, limits.room))
    apart = spread_out(table, problem, scaled, limits.bound)
    if missing.any() or apart or over:
        changed = missing.any(axis=1) | apart | over
        table.share(np.where(changed, limits.goal, np.inf))
    Repair(table, problem, scaled, limits).run()
    table.settle(limits.goal)
    if not (must.any() or apart or over) and _seconds(table, limits) > seconds * (1 - _WORTH):
        table.restore(stay)
    return Assignment.of(problem, _finish(table, scaled, settings))


def _least(scaled: Scale, settings: PlacementSettings) -> Ints:
    """[L, E] copies that are not for the sake of speed."""
    least: Ints = np.minimum(np.maximum(np.where(scaled.spread, 2, 1), settings.min_copies), scaled.copies)
    return least


def _seconds(table: Table, limits: Limits) -> float:
    """Seconds of all layers; what is good enough counts as that."""
    level = table.level(np.arange(table.layers))
    top = np.where(level > table.call_s, level, 0.0).max(axis=1, initial=0.0)
    return float(np.maximum(top, limits.goal).sum())


def _limits(problem: Problem, scaled: Scale, settings: PlacementSettings) -> Limits:
    devices = problem.devices
    least = lower_bound((scaled.work * (scaled.copies > 0)).sum(axis=1), devices.call_s, devices.speed)
    most = settings.max_moved_bytes
    return Limits(
        goal=np.maximum(least, scaled.target / devices.speed.max()) * settings.imbalance,
        price=copy_price(problem, settings),
        bound=1 << 62 if most is None else most // problem.slice_bytes,
        rounds=settings.repairs,
        room=room_for(problem, settings),
        least=settings.min_copies,
    )


def _keepable(problem: Problem, scaled: Scale) -> Copies:
    """Residents that are wanted, on devices that may hold them and have the memory: the busiest slices first."""
    held = problem.resident
    wanted = scaled.copies[held.layer, held.expert] > 0
    if problem.bound:
        wanted &= problem.unit[held.layer, held.expert] == problem.devices.unit[held.device]
    held = held.where(wanted)
    size = np.bincount(held.device, minlength=len(problem.devices))
    if (size <= problem.slots).all():
        return held
    order = np.argsort(-scaled.work[held.layer, held.expert], kind="stable")
    rank = np.empty(len(held), dtype=np.int64)
    rank[order] = rank_among(held.device[order])
    return held.where(rank < problem.slots[held.device])


def _missing(table: Table, scaled: Scale, settings: PlacementSettings, bound: int) -> Ints:
    """[L, E] copies to load: where a slice has none, or those it has are too slow for the layer's target."""
    have = table.copies[:, :-1]
    mean = (scaled.work * (scaled.copies > 0)).sum(axis=1) / table.speed.sum()
    slack = np.maximum(scaled.target, mean)[:, None] * settings.imbalance
    fast = scaled.work <= slack * np.minimum(have, scaled.parts)
    enough = (have > 0) & fast & (have >= _least(scaled, settings))
    missing = np.where(enough, 0, np.maximum(scaled.copies - have, 0))
    if int(missing.sum()) <= bound:
        return missing
    first = np.minimum(missing, have == 0)
    rest = largest_first(missing - first, scaled.work, bound - int(first.sum()))
    return largest_first(first, scaled.work, bound) + rest


def _make_room(table: Table, scaled: Scale, missing: Ints, room: int) -> Ints:
    """Forget copies beyond those wanted where memory is short, in layers that need some first; [L, D] how many where.

    A slice gives up the copies on the busiest devices; of a layer's slices those give first that lose least.
    """
    given_up = np.zeros((table.layers, table.devices), dtype=np.int64)
    needs = missing.sum(axis=1)
    short = int(needs.sum()) - min(int(table.free.sum()), room - table.total)
    if short <= 0:
        return given_up
    have = table.copies[:, :-1]
    extra = np.pad(have - scaled.copies, ((0, 0), (0, 1)))
    layer, column = np.nonzero(np.take_along_axis(extra, table.expert, axis=1) > 0)
    expert, device = table.expert[layer, column], table.device[layer, column]
    seconds = table.level(np.arange(table.layers))[layer, device]
    order = np.argsort(-seconds, kind="stable")
    nth = np.empty(len(order), dtype=np.int64)
    nth[order] = rank_among((layer * table.experts + expert)[order])
    harm = scaled.work[layer, expert] / np.maximum(have[layer, expert] - 1 - nth, 1)
    chosen = np.flatnonzero(nth < extra[layer, expert])
    chosen = chosen[np.lexsort((harm[chosen], layer[chosen]))]
    own = rank_among(layer[chosen]) < needs[layer[chosen]]
    chosen = np.concatenate([chosen[own], chosen[~own]])[:short]
    np.add.at(given_up, (layer[chosen], device[chosen]), 1)
    table.drop(layer[chosen], column[chosen])
    return given_up


def _finish(table: Table, scaled: Scale, settings: PlacementSettings) -> Copies:
    """Seconds as shares. Where memory has a price, copies that get next to nothing and aren't held in reserve go."""
    layer, column = table.entries()
    expert, part = table.expert[layer, column], table.part[layer, column].copy()
    slices = layer * table.experts + expert
    part[part < _TRIFLE * scaled.work[layer, expert]] = 0.0
    if settings.gib_worth > 0:
        least = _least(scaled, settings)[layer, expert]
        order = np.argsort(-part, kind="stable")
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = rank_among(slices[order])
        kept = (part > 0) | (rank < least)
        layer, column, expert, slices = (given[kept] for given in (layer, column, expert, slices))
        part = part[kept]
    total = np.bincount(slices, weights=part, minlength=scaled.work.size)[slices]
    even = 1 / np.bincount(slices, minlength=scaled.work.size)[slices]
    share = np.where(total > 0, part / np.maximum(total, 1e-300), even)
    return Copies.of(layer, expert, table.device[layer, column], share)
