"""Which replica runs which rows of a layer: pure bookkeeping on counts, no tensors and no sockets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

R = TypeVar("R")


class Part(NamedTuple):
    """`rows` rows of one expert, from `start` on in the order sorted by expert."""

    expert: int
    start: int
    rows: int


def assign(
    counts: Sequence[int], copies: Callable[[int], Sequence[R]], min_rows: int, turn: int
) -> tuple[list[tuple[R, list[Part]]], list[Part]]:
    """Give every row of a layer to a replica of its expert, or to the inline path where there is none.

    `counts[e]` rows go to expert e, whose live replicas are `copies(e)`. An expert's rows are split evenly over its
    replicas, but into parts of at least `min_rows`: each part reads the weights once more (METRO, arXiv 2512.09277).
    `turn` rotates which replicas get the parts, so that small batches visit all of them.
    Returns the parts of each replica, and the inline parts; together they cover each row once.
    """
    remote: dict[R, list[Part]] = {}
    inline: list[Part] = []
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        replicas = copies(expert)
        if not replicas:
            inline.append(Part(expert, start, count))
        else:
            for replica, part in _split(expert, start, count, replicas, min_rows, turn):
                remote.setdefault(replica, []).append(part)
        start += count
    return list(remote.items()), inline


def _split(
    expert: int, start: int, count: int, replicas: Sequence[R], min_rows: int, turn: int
) -> list[tuple[R, Part]]:
    parts = max(1, min(len(replicas), count // min_rows))
    edges = [start + count * i // parts for i in range(parts + 1)]
    return [
        (replicas[(turn + i) % len(replicas)], Part(expert, edges[i], edges[i + 1] - edges[i])) for i in range(parts)
    ]
