"""How far a forecast looks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from predictor.records import Records


@dataclass(frozen=True)
class Horizon:
    """The steps right after a moment: so many of them, or those that end within so many seconds."""

    steps: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.seconds > 0):
            raise ValueError(f"a horizon has either steps or seconds, not {self.steps} steps and {self.seconds} s")

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.steps else f"{self.seconds:g} s"

    def ends(self, time_s: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """For each step at `time_s` [S] the number of its horizon's last step; -1 where the records end before it."""
        count = len(time_s)
        if self.steps:
            ends = np.arange(count) + self.steps
        else:
            ends = np.searchsorted(time_s, time_s + self.seconds, side="right") - 1
            ends[time_s + self.seconds > time_s[-1]] = count
        return np.where(ends < count, ends, -1)


HORIZONS = (Horizon(steps=16), Horizon(seconds=3.0))


@dataclass(frozen=True)
class Future:
    """What came within the horizon of n moments."""

    counts: npt.NDArray[np.float32]
    """[n, L, E]: rows per expert"""
    prefill_rows: npt.NDArray[np.float32]
    """[n], as `decode_rows`"""
    decode_rows: npt.NDArray[np.float32]
    foreseen: npt.NDArray[np.float32]
    """[n, L, E]: see `LoadStep.foreseen`"""

    def take(self, chosen: npt.NDArray[np.int64] | slice) -> Future:
        """That of some of the moments."""
        return Future(self.counts[chosen], self.prefill_rows[chosen], self.decode_rows[chosen], self.foreseen[chosen])

    @property
    def shares(self) -> npt.NDArray[np.float32]:
        """[n, L, E]: of each layer's rows; zeros where there were none."""
        total = self.counts.sum(axis=2, keepdims=True)
        return np.asarray(self.counts / np.maximum(total, 1), np.float32)


def future(records: Records, moments: npt.NDArray[np.int64], horizon: Horizon) -> Future:
    """What came after each of `moments` [n], numbers of steps whose horizon lies within the records."""
    ends = horizon.ends(records.time_s)[moments]
    return Future(
        counts=_between(records.counts, moments, ends),
        prefill_rows=_between(records.prefill_rows, moments, ends),
        decode_rows=_between(records.decode_rows, moments, ends),
        foreseen=_between(records.foreseen, moments, ends),
    )


def _between(
    values: npt.NDArray[np.int32] | npt.NDArray[np.float32], after: npt.NDArray[np.int64], until: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    sums = np.cumsum(values, axis=0, dtype=np.float64)
    return (sums[until] - sums[after]).astype(np.float32)
