"""What compiled code has to be told, and tells, while it answers a replica's calls without Python."""

from __future__ import annotations

from typing import NamedTuple

import torch

_RING = 64
"""As in exchange.h; a call more than these between two looks is counted, but its time is not looked at."""
_HEAD = 4


class TimedCall(NamedTuple):
    """A call, its `rows` in so many `segments`, and what it took."""

    seconds: float
    segments: int
    rows: int


class Tally:
    """Numbers shared with exchange.h, `numbers` (int64).

    First a stamp, by which compiled code knows that other slices are loaded now and returns; then nanoseconds, calls
    and rows since the start; then the latest calls: nanoseconds, segments and rows of each.
    """

    def __init__(self) -> None:
        self.numbers = torch.zeros(_HEAD + 3 * _RING, dtype=torch.int64)
        self._looked = 0

    @property
    def stamp(self) -> int:
        """Changes with the slices that are loaded."""
        return int(self.numbers[0])

    def change(self) -> None:
        """Other slices are loaded now: whoever holds their weights lets go of them."""
        self.numbers[0] += 1

    def totals(self) -> tuple[float, int, int]:
        """Seconds, calls and rows since the start."""
        _, spent, calls, rows = self.numbers[:_HEAD].tolist()
        return 1e-9 * spent, calls, rows

    def latest(self) -> list[TimedCall]:
        """Calls since the last time this was asked; of many only the latest."""
        calls = int(self.numbers[2])
        new = range(max(self._looked, calls - _RING), calls)
        self._looked = calls
        ring = self.numbers[_HEAD:].view(_RING, 3)[[number % _RING for number in new]].tolist()
        return [TimedCall(1e-9 * spent, segments, rows) for spent, segments, rows in ring if segments]
