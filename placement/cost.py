"""What a layer's rows cost, here or over the wire. Pure.

In memory-bound decoding time follows the number of experts that are read, not the number of rows (METRO, arXiv
2512.09277): an expert's rows take `max(read its weights, compute its rows)`. Speeds differ by machine and by load, so
they are learned from what was measured.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Grid = npt.NDArray[np.float64]

_KNEES: Grid = 2.0 ** np.arange(0, 12.5, 0.5)
"""Rows from which on computing takes longer than reading: 1 to 4096."""
_FEWEST = 8
"""Calls before anything is said, ..."""
_REFIT = 256
"""... and between two fits, at most."""
_KEPT = 32
_HALF_LIFE = 512
_LOYALTY = 0.01
_FORGETS = 200


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds to read one expert's weights of a layer, and to compute one of its rows."""

    read_s: float
    row_s: float

    @classmethod
    def of(cls, slice_bytes: int, slice_numbers: int) -> Speed:
        """Of an ordinary core: 15 GB/s from memory, 200 billion operations a second."""
        return cls(slice_bytes / 15e9, 2 * slice_numbers / 200e9)

    def seconds(self, rows: Iterable[int]) -> float:
        """Time of experts with so many `rows` each, one after the other."""
        return sum(max(self.read_s, self.row_s * count) for count in rows)


class SpeedFit:
    """Learns a `Speed` from what calls took, online.

    Time is `read_s * sum(max(1, rows / knee))`: for each knee of a grid the best `read_s` is a weighted median, and the
    knee that explains the times best is taken, in doubt the one before. Medians, of logarithms: a call that was
    interrupted counts no more than any other. Old calls fade; of each size of segments the latest are kept, so that
    prefills are not forgotten while nothing but decoding comes.
    """

    def __init__(self, prior: Speed) -> None:
        """`prior` is believed in where nothing was measured: it gives the first knee."""
        self._knee = prior.read_s / prior.row_s
        self._kept: dict[int, collections.deque[_Timed]] = {}
        self._count = 0
        self._due = _FEWEST
        self._speed: Speed | None = None

    @property
    def speed(self) -> Speed | None:
        """What was learned; None until there were a few calls. Now and then this takes a millisecond."""
        if self._count >= self._due:
            self._due = self._count + min(self._count, _REFIT)
            self._speed = self._fit()
        return self._speed

    def observe(self, rows: Sequence[int], seconds: float) -> None:
        """A call with segments of so many `rows` took `seconds`."""
        if not rows or seconds <= 0:
            return
        self._count += 1
        size = (sum(rows) // len(rows)).bit_length()
        kept = self._kept.get(size)
        if kept is None:
            kept = self._kept.setdefault(size, collections.deque(maxlen=_KEPT))
        kept.append(_Timed(self._count, seconds, tuple(collections.Counter(rows).items())))

    def _fit(self) -> Speed:
        timed = [each for kept in list(self._kept.values()) for each in list(kept)]
        rows = np.array([count for each in timed for count, _ in each.segments], float)
        times = np.array([many for each in timed for _, many in each.segments], float)
        starts = np.cumsum([0, *(len(each.segments) for each in timed[:-1])])
        work = np.add.reduceat(times * np.maximum(1.0, rows / _KNEES[:, None]), starts, axis=1)  # [knees, calls]
        ratios = np.log([each.seconds for each in timed]) - np.log(work)
        weights = 0.5 ** ((self._count - np.array([each.number for each in timed])) / _HALF_LIFE)
        reads = _weighted_medians(ratios, weights)
        losses = (np.abs(ratios - reads[:, None]) * weights).sum(1) / weights.sum()
        best = int(np.argmin(losses + _LOYALTY * np.abs(np.log2(_KNEES / self._knee))))
        self._knee = float(_KNEES[best])
        read_s = math.exp(reads[best])
        return Speed(read_s, read_s / self._knee)


class CallFit:
    """Learns what calls take beyond the computing: a median of the latest, so that no stray one counts."""

    def __init__(self, prior_s: float) -> None:
        self._prior_s = prior_s
        self._kept: collections.deque[float] = collections.deque([prior_s], maxlen=_KEPT)
        self._untried = 0
        self.seen = 0
        """Calls measured."""
        self.seconds = prior_s
        """What is expected."""

    def observe(self, expected_s: float, took_s: float) -> None:
        """Calls whose computing was expected to take so long took `took_s`."""
        self.seen += 1
        self._take(max(took_s - expected_s, 0.0))

    def forget(self) -> None:
        """Drift back to what was expected: what is never tried again would never be found to have changed."""
        self._untried += 1
        if self._untried % _FORGETS == 0:
            self._take(self._prior_s)

    def _take(self, seconds: float) -> None:
        self._kept.append(seconds)
        self.seconds = sorted(self._kept)[len(self._kept) // 2]


class _Timed(NamedTuple):
    """A call that was measured: its number, how long it took, and (rows, segments that have so many)."""

    number: int
    seconds: float
    segments: tuple[tuple[int, int], ...]


def _weighted_medians(values: Grid, weights: Grid) -> Grid:
    """Of each row of `values [R, N]` the median by `weights [N]`: `[R]`."""
    order = np.argsort(values, axis=1)
    heaped = np.cumsum(weights[order], axis=1)
    middle = (heaped < heaped[:, -1:] / 2).sum(1)
    rows = np.arange(len(values))
    result: Grid = values[rows, order[rows, middle]]
    return result
