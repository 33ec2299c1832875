"""What can be made of a trace before it is used: a part of it, faster, more or less of it. Iterators of chunks, pure.

None of them depends on where one chunk ends and the next begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from replay.trace import Chunk, TraceError

_COPY_BITS = 48  # hash ids of copies lie above those of the trace


@dataclass(frozen=True)
class Selection:
    """Which part of a trace is used, and how; applied in the order of the fields."""

    window: tuple[float, float | None] = (0.0, None)
    """Seconds since the first request: from, to"""
    scale: float = 1.0
    """How many times as many requests, at the same pace of time"""
    speed: float = 1.0
    """How many times as fast the trace's clock runs"""
    limit: int | None = None
    """Requests at most"""
    seed: int = 0
    """Which requests `scale` leaves out or repeats"""

    def __post_init__(self) -> None:
        for name, factor in (("--scale", self.scale), ("--speed", self.speed)):
            if not (math.isfinite(factor) and factor > 0):
                raise TraceError(f"{name} {factor} is no factor above 0")
        if self.limit is not None and self.limit < 1:
            raise TraceError(f"--limit {self.limit} leaves no request: give 1 or more")

    def of(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The selected part of a whole trace."""
        chosen = window(chunks, *self.window)
        chosen = speed(scale(chosen, self.scale, self.seed), self.speed)
        return chosen if self.limit is None else limit(chosen, self.limit)


def window(chunks: Iterable[Chunk], start_s: float = 0.0, end_s: float | None = None) -> Iterator[Chunk]:
    """Requests from `start_s` until before `end_s`, on a clock that begins with the window."""
    for chunk in chunks:
        first = int(np.searchsorted(chunk.time_s, start_s, "left"))
        last = len(chunk) if end_s is None else int(np.searchsorted(chunk.time_s, end_s, "left"))
        if first < last:
            part = chunk if (first, last) == (0, len(chunk)) else chunk.take(np.arange(first, last))
            yield replace(part, time_s=part.time_s - start_s) if start_s else part
        if last < len(chunk):
            return


def speed(chunks: Iterable[Chunk], factor: float) -> Iterator[Chunk]:
    """The same requests on a clock that runs `factor` times as fast."""
    for chunk in chunks:
        yield chunk if factor == 1 else replace(chunk, time_s=chunk.time_s / factor)


def limit(chunks: Iterable[Chunk], most: int) -> Iterator[Chunk]:
    """The first `most` requests."""
    left = most
    for chunk in chunks:
        if len(chunk) >= left:
            if left:
                yield chunk.take(np.arange(left))
            return
        left -= len(chunk)
        yield chunk


def answered(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Without requests that failed when the trace was recorded: nobody knows how long their answers would have been."""
    for chunk in chunks:
        keep = np.flatnonzero(chunk.answer_tokens > 0)
        if len(keep):
            yield chunk if len(keep) == len(chunk) else chunk.take(keep)


def scale(chunks: Iterable[Chunk], factor: float, seed: int = 0) -> Iterator[Chunk]:
    """`factor` times as many requests at the same pace: some are left out, or each comes several times.

    A copy arrives at a random moment before the trace's next request, so bursts stay bursts. It shares prefixes with
    other copies of its number, not with the original: as many more users as there are copies.
    """
    if factor == 1:
        yield from chunks
        return
    index = 0
    for chunk, after in _with_next_time(chunks):
        copies = _copies(index + np.arange(len(chunk)), factor, seed)
        index += len(chunk)
        if copies.any():
            yield _repeated(chunk, copies, after, index, seed)


def in_order(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """All requests sorted by time (the same time: as they came), the first at 0. Holds the whole trace in memory."""
    held = [chunk for chunk in chunks if len(chunk)]
    if not held:
        return
    whole = joined(held)
    ordered = whole.take(np.argsort(whole.time_s, kind="stable"))
    yield replace(ordered, time_s=ordered.time_s - ordered.time_s[0])


def joined(chunks: list[Chunk]) -> Chunk:
    """One chunk of all `chunks`, at least one."""
    ids = [chunk.hash_ids if chunk.hash_ids is not None else ((),) * len(chunk) for chunk in chunks]
    kinds = [chunk.kinds if chunk.kinds is not None else ("",) * len(chunk) for chunk in chunks]
    return Chunk(
        np.concatenate([chunk.time_s for chunk in chunks]),
        np.concatenate([chunk.prompt_tokens for chunk in chunks]),
        np.concatenate([chunk.answer_tokens for chunk in chunks]),
        None if all(chunk.hash_ids is None for chunk in chunks) else tuple(row for part in ids for row in part),
        None if all(chunk.kinds is None for chunk in chunks) else tuple(row for part in kinds for row in part),
    )


def _with_next_time(chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, float]]:
    """Each chunk with the time of the request after it (at the end its own last one)."""
    held: Chunk | None = None
    for chunk in chunks:
        if held is not None and len(chunk):
            yield held, float(chunk.time_s[0])
        held = chunk if len(chunk) else held
    if held is not None:
        yield held, float(held.time_s[-1])


def _copies(index: npt.NDArray[np.int64], factor: float, seed: int) -> npt.NDArray[np.int64]:
    """How often each request comes."""
    whole = math.floor(factor)
    return whole + (_uniform(index, 0, seed) < factor - whole).astype(np.int64)


def _repeated(chunk: Chunk, copies: npt.NDArray[np.int64], after: float, index: int, seed: int) -> Chunk:
    rows = np.repeat(np.arange(len(chunk)), copies)
    number = np.arange(len(rows)) - np.repeat(np.cumsum(copies) - copies, copies)  # of the copy, 0: the original
    gap = np.diff(chunk.time_s, append=after)[rows]
    offset = np.where(number, _uniform(index - len(chunk) + rows, number, seed) * gap, 0.0)
    time = chunk.time_s[rows] + offset
    order = np.argsort(time, kind="stable")
    made = replace(chunk.take(rows[order]), time_s=time[order])
    if made.hash_ids is None:
        return made
    shift = (number[order] << _COPY_BITS).tolist()
    return replace(
        made, hash_ids=tuple(tuple(i + by for i in ids) for ids, by in zip(made.hash_ids, shift, strict=True))
    )


def _uniform(index: npt.NDArray[np.int64], stream: npt.NDArray[np.int64] | int, seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each request, the same wherever it is asked for (SplitMix64 of its number)."""
    with np.errstate(over="ignore"):
        x = (index.astype(np.uint64) << np.uint64(8)) + np.asarray(stream).astype(np.uint64)
        x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed) * np.uint64(0xD1B54A32D192ED03)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x = x ^ (x >> np.uint64(31))
    mantissa: npt.NDArray[np.float64] = (x >> np.uint64(11)).astype(np.float64) / (1 << 53)
    return mantissa
