"""What a trace is like: lengths, rate, burstiness. One pass, constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from replay.trace import Chunk, TraceError

PERCENTILES = (50, 90, 99)
_EXACT = 1 << 20  # longer lengths are counted in steps of 1024 tokens
_MOST_BINS = 1 << 22
_MOST_IDS = 5_000_000
_WINDOW_BINS = 60


@dataclass(frozen=True)
class Lengths:
    """Lengths of prompts or answers, tokens."""

    mean: float
    p50: int
    p90: int
    p99: int
    longest: int


@dataclass(frozen=True)
class TraceStatistics:
    """What a trace is like."""

    requests: int
    failed: int
    """Of them without an answer"""
    span_s: float
    """From the first request to the last"""
    rate: float
    """Requests a second over the span"""
    peak_rate: float
    """The same in the busiest window of `60 * bin_s`"""
    prompt_tokens: Lengths
    answer_tokens: Lengths
    """Of requests that did not fail"""
    gap_variation: float
    """Standard deviation of the gaps between requests, by their mean: 1 for independent arrivals, more for bursts"""
    dispersion: dict[str, float]
    """Variance of the requests in a window, by their mean, for windows of so many seconds: 1 likewise"""
    shared_blocks: float | None
    """Part of all prompt blocks whose id came before; None where ids are not told"""
    bin_s: float
    """Width of the bins of `arrivals`"""
    arrivals: npt.NDArray[np.int64]
    """Requests in each bin of time"""
    prompt_histogram: npt.NDArray[np.int64]
    """Requests by length of their prompt, tokens (above 2^20 in steps of 1024)"""
    answer_histogram: npt.NDArray[np.int64]

    def as_json(self) -> dict[str, Any]:
        """All numbers, without the arrays."""
        return {name: value for name, value in asdict(self).items() if not isinstance(value, np.ndarray)}


def describe(chunks: Iterable[Chunk]) -> TraceStatistics:
    """The statistics of a trace; raise TraceError where it has no request."""
    counter = _Counter()
    for chunk in chunks:
        if len(chunk):
            counter.add(chunk)
    return counter.result()


class _Histogram:
    """How many requests have which length."""

    def __init__(self) -> None:
        self.counts = np.zeros(1024, np.int64)
        self._sum = 0

    def add(self, lengths: npt.NDArray[np.int64]) -> None:
        self._sum += int(lengths.sum())
        bins = np.where(lengths < _EXACT, lengths, _EXACT + (lengths - _EXACT >> 10))
        counts = np.bincount(bins, minlength=len(self.counts))
        counts[: len(self.counts)] += self.counts
        self.counts = counts

    def lengths(self) -> Lengths:
        total = int(self.counts.sum())
        if not total:
            return Lengths(0.0, 0, 0, 0, 0)
        below = np.cumsum(self.counts)
        ranks = [math.ceil(total * percentile / 100) for percentile in (*PERCENTILES, 100)]
        found = (int(np.searchsorted(below, rank)) for rank in ranks)
        return Lengths(self._sum / total, *(n if n < _EXACT else _EXACT + (n - _EXACT << 10) for n in found))


class _Counter:
    def __init__(self) -> None:
        self._requests = self._failed = self._gaps = 0
        self._last = self._gap_sum = self._gap_squares = 0.0
        self._bin_s = 1.0
        self._bins = np.zeros(1024, np.int64)
        self._prompts, self._answers = _Histogram(), _Histogram()
        self._ids: set[int] = set()
        self._blocks = self._repeated = 0

    def add(self, chunk: Chunk) -> None:
        gaps = np.diff(chunk.time_s, prepend=self._last if self._requests else chunk.time_s[0])
        self._gap_sum += float(gaps.sum())
        self._gap_squares += float((gaps**2).sum())
        self._requests += len(chunk)
        self._last = float(chunk.time_s[-1])
        self._count_arrivals(chunk.time_s)
        answered = chunk.answer_tokens > 0
        self._failed += int((~answered).sum())
        self._prompts.add(chunk.prompt_tokens)
        self._answers.add(chunk.answer_tokens[answered])
        self._count_blocks(chunk)

    def _count_arrivals(self, time_s: npt.NDArray[np.float64]) -> None:
        while time_s[-1] / self._bin_s >= _MOST_BINS:
            pairs = np.append(self._bins, np.zeros(len(self._bins) % 2, np.int64)).reshape(-1, 2)
            self._bins, self._bin_s = pairs.sum(axis=1), 2 * self._bin_s
        counts = np.bincount((time_s / self._bin_s).astype(np.int64), minlength=len(self._bins))
        counts[: len(self._bins)] += self._bins
        self._bins = counts

    def _count_blocks(self, chunk: Chunk) -> None:
        for ids in chunk.hash_ids or ():
            self._blocks += len(ids)
            self._repeated += sum(i in self._ids for i in ids)
            if len(self._ids) < _MOST_IDS:
                self._ids.update(ids)

    def result(self) -> TraceStatistics:
        if not self._requests:
            raise TraceError("no request of the trace is left: choose another --window")
        bins = self._bins[: int(self._last / self._bin_s) + 1]
        return TraceStatistics(
            requests=self._requests,
            failed=self._failed,
            span_s=self._last,
            rate=(self._requests - 1) / self._last if self._last else 0.0,
            peak_rate=_most_within(bins, _WINDOW_BINS) / (min(_WINDOW_BINS, len(bins)) * self._bin_s),
            prompt_tokens=self._prompts.lengths(),
            answer_tokens=self._answers.lengths(),
            gap_variation=self._gap_variation(),
            dispersion={
                f"{size * self._bin_s:g}": _dispersion(_summed(bins, size)[: len(bins) // size])
                for size in (1, _WINDOW_BINS)
                if len(bins) >= 2 * size
            },
            shared_blocks=self._repeated / self._blocks if self._blocks else None,
            bin_s=self._bin_s,
            arrivals=bins,
            prompt_histogram=self._prompts.counts,
            answer_histogram=self._answers.counts,
        )

    def _gap_variation(self) -> float:
        gaps = self._requests - 1
        if not self._gap_sum:
            return 0.0
        mean = self._gap_sum / gaps
        return math.sqrt(max(self._gap_squares / gaps - mean**2, 0.0)) / mean


def _summed(bins: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Sums of `size` bins each; the last window may be shorter."""
    sums: npt.NDArray[np.int64] = np.add.reduceat(bins, np.arange(0, len(bins), size))
    return sums


def _most_within(bins: npt.NDArray[np.int64], size: int) -> int:
    """The largest sum of `size` bins in a row (of all, where there are fewer)."""
    before = np.concatenate([[0], np.cumsum(bins)])
    size = min(size, len(bins))
    return int((before[size:] - before[:-size]).max())


def _dispersion(counts: npt.NDArray[np.int64]) -> float:
    return float(counts.var() / counts.mean()) if counts.any() else 0.0
