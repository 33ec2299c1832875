"""How a layer's rows are shared among the copies of their experts, known exactly: so that all replicas end together.

A plan's shares come from a forecast of many steps; a single step's counts scatter around it. The dispatcher sees the
counts before it sends anything, so it can level them step by step, as far as there are copies to choose from. Pure.

A replica takes ``max(read_s, row_s * n)`` for n rows of one expert (METRO, arXiv 2512.09277): a part that is too small
to be worth another reading of the weights is not split off.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from gateway.assignment import Holders, Part

R = TypeVar("R")

_SWEEPS = 6
_WORTH = 0.99
"""Another sweep follows one that lowered the busiest replica's time to less than this part."""


class Pace(NamedTuple):
    """What a replica takes for one expert: seconds to read its weights, and for each row."""

    read_s: float
    row_s: float


def assign_levelled(
    counts: Sequence[int], holders: Callable[[int], Holders[R]], pace: Callable[[R], Pace], turn: int
) -> tuple[list[tuple[R, list[Part]]], list[Part]]:
    """As `gateway.assignment.assign`, but sharing by what ends soonest; `turn` decides between replicas alike."""
    starts = [0, *itertools.accumulate(counts)]
    held = {expert: holders(expert).replicas for expert, count in enumerate(counts) if count}
    inline = [Part(expert, starts[expert], counts[expert]) for expert, replicas in held.items() if not replicas]
    held = {expert: replicas for expert, replicas in held.items() if replicas}
    places: dict[R, int] = {}
    for replicas in held.values():
        for replica in replicas:
            places.setdefault(replica, len(places))
    turned = {expert: _turned(replicas, turn + expert) for expert, replicas in held.items()}
    found = level(
        [counts[expert] for expert in turned],
        [[places[replica] for replica in replicas] for replicas in turned.values()],
        [pace(replica) for replica in places],
    )
    remote: dict[R, list[Part]] = {}
    for (expert, replicas), shares in zip(turned.items(), found, strict=True):
        start = starts[expert]
        for replica, count in zip(replicas, shares, strict=True):
            if count:
                remote.setdefault(replica, []).append(Part(expert, start, count))
                start += count
    return list(remote.items()), inline


def _turned(replicas: tuple[R, ...], by: int) -> tuple[R, ...]:
    by %= len(replicas)
    return replicas[by:] + replicas[:by]


def level(rows: Sequence[int], holders: Sequence[Sequence[int]], paces: Sequence[Pace]) -> list[list[int]]:
    """Rows that each holder of each expert gets; they sum to the expert's `rows`.

    `holders[i]` are the places in `paces` of the replicas that have expert i, at least one.
    """
    busy = [0.0] * len(paces)
    found: list[list[int]] = [[0]] * len(rows)
    shared = []
    for i, count in enumerate(rows):
        if len(holders[i]) == 1:
            found[i] = [count]
            busy[holders[i][0]] += _seconds(paces[holders[i][0]], count)
        else:
            shared.append(i)
    shared.sort(key=lambda i: -rows[i])
    top = float("inf")
    for sweep in range(min(_SWEEPS, len(shared))):
        for i in shared:
            if sweep:
                _give(holders[i], found[i], paces, busy, -1)
            found[i] = _pour(rows[i], holders[i], paces, busy)
            _give(holders[i], found[i], paces, busy, 1)
        if max(busy) > _WORTH * top:
            break
        top = max(busy)
    return found


def _give(holders: Sequence[int], counts: Sequence[int], paces: Sequence[Pace], busy: list[float], sign: int) -> None:
    for place, count in zip(holders, counts, strict=True):
        busy[place] += sign * _seconds(paces[place], count)


def _seconds(pace: Pace, rows: int) -> float:
    return max(pace.read_s, pace.row_s * rows) if rows else 0.0


def _pour(rows: int, holders: Sequence[int], paces: Sequence[Pace], busy: Sequence[float]) -> list[int]:
    """Water-filling over as many of the holders, the least busy first, as end it soonest."""
    order = sorted(range(len(holders)), key=lambda place: busy[holders[place]])
    best, surface, chosen = float("inf"), 0.0, 0
    weighted, speeds, floor = 0.0, 0.0, 0.0
    for used, place in enumerate(order, 1):
        pace, base = paces[holders[place]], busy[holders[place]]
        weighted += base / pace.row_s
        speeds += 1 / pace.row_s
        height = (rows + weighted) / speeds
        if height <= base and used > 1:
            break  # it, and all behind it, are busy for longer than the others will be
        floor = max(floor, base + pace.read_s)
        if max(height, floor) < best:
            best, surface, chosen = max(height, floor), height, used
    shares = [0.0] * len(holders)
    for place in order[:chosen]:
        shares[place] = max(0.0, (surface - busy[holders[place]]) / paces[holders[place]].row_s)
    return _whole(rows, shares)


def _whole(rows: int, shares: list[float]) -> list[int]:
    """Whole numbers near `shares` that sum to `rows`: the largest remainders are rounded up."""
    counts = [int(share) for share in shares]
    left = rows - sum(counts)
    for place in sorted(range(len(shares)), key=lambda place: counts[place] - shares[place])[:left]:
        counts[place] += 1
    return counts
