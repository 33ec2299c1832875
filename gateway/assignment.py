"""Which replica runs which rows of a layer: pure bookkeeping on counts, no tensors and no sockets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Generic, NamedTuple, TypeVar

R = TypeVar("R")

_PHASE, _ROUNDING = 0.6180339887498949, 0.41421356237309515
"""Multiples of either, modulo 1, fill the unit interval evenly."""


class Part(NamedTuple):
    """`rows` rows of one expert, from `start` on in the order sorted by expert."""

    expert: int
    start: int
    rows: int


class Holders(NamedTuple, Generic[R]):
    """Replicas that take an expert's rows, and their shares."""

    replicas: tuple[R, ...]
    edges: tuple[float, ...]
    """Where each one's share ends, on the way from 0 to 1."""
    least: float
    """The smallest share."""

    @classmethod
    def of(cls, shares: Sequence[tuple[R, float]]) -> Holders[R]:
        """Replicas with their shares, which are above 0 and need not sum to one."""
        total = sum(share for _, share in shares)
        edges = [edge / total for edge in itertools.accumulate(share for _, share in shares)]
        least = min((share for _, share in shares), default=0.0) / (total or 1.0)
        return cls(tuple(replica for replica, _ in shares), (*edges[:-1], *[1.0][: len(edges)]), least)

    @classmethod
    def evenly(cls, replicas: Collection[R]) -> Holders[R]:
        """Replicas with equal shares."""
        return cls.of([(replica, 1.0) for replica in replicas])

    def only(self, usable: Callable[[R], bool]) -> Holders[R]:
        """Those that are `usable`, in the same proportions."""
        shares = [end - begin for begin, end in zip((0.0, *self.edges), self.edges, strict=False)]
        return Holders.of([each for each in zip(self.replicas, shares, strict=True) if usable(each[0])])


def assign(
    counts: Sequence[int], holders: Callable[[int], Holders[R]], min_rows: int, turn: int
) -> tuple[list[tuple[R, list[Part]]], list[Part]]:
    """Give every row of a layer to a replica that holds its expert, or to the inline path where there is none.

    `counts[e]` rows go to expert e, over `holders(e)` by their shares, but in parts of at least `min_rows`: each part
    reads the weights once more (METRO, arXiv 2512.09277). What the shares leave over goes round: `turn`, one more each
    time that the layer is run, decides, so that shares hold over time, for single rows too, and over experts.
    Returns the parts of each replica, and the inline parts; together they cover each row once.
    """
    remote: dict[R, list[Part]] = {}
    inline: list[Part] = []
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        replicas, edges, least = holders(expert)
        if not replicas:
            inline.append(Part(expert, start, count))
        elif len(replicas) == 1:
            remote.setdefault(replicas[0], []).append(Part(expert, start, count))
        else:
            pieces = count if count * least >= min_rows else max(1, count // min_rows)
            begin = 0
            for replica, end in zip(replicas, _cut(count, pieces, edges, turn + expert), strict=True):
                if end > begin:
                    remote.setdefault(replica, []).append(Part(expert, start + begin, end - begin))
                begin = end
        start += count
    return list(remote.items()), inline


def _cut(count: int, pieces: int, edges: Sequence[float], turn: int) -> list[int]:
    """Where each one's part of `count` rows ends: whole pieces only, as many as the share says or one more.

    Systematic sampling: piece i goes to whose share (i + phase) / pieces falls into; over all phases that is its share.
    """
    phase, rounding = turn * _PHASE % 1.0, turn * _ROUNDING % 1.0
    before = [min(pieces, max(0, math.ceil(pieces * edge - phase))) for edge in edges[:-1]]
    return [min(count, int(count * piece / pieces + rounding)) if piece else 0 for piece in before] + [count]
