"""What a layer's rows cost, here or over the wire. Pure.

In memory-bound decoding time follows the number of experts that are read, not the number of rows (METRO, arXiv
2512.09277): an expert's rows take `max(read its weights, compute its rows)`. Absolute speeds differ by machine and by
load, so a `Speed` is only the shape; a `Pace` learns from what was measured how far reality is from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_LEARNS = 0.1
_FORGETS = 0.001


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


class Pace:
    """How many times longer than expected work takes; 1 until something was measured."""

    def __init__(self) -> None:
        self.factor = 1.0

    def observe(self, expected_s: float, took_s: float) -> None:
        """Learn from one measurement."""
        self.factor += _LEARNS * (took_s / expected_s - self.factor)

    def forget(self) -> None:
        """Drift back to what was expected: what is never tried again would never be found to have changed."""
        self.factor += _FORGETS * (1.0 - self.factor)
