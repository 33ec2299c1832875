"""Forecasts that were not made but recorded: the oracle a planner is compared with. Pure: time is an argument.

The same traffic is served twice: once recorded, and once with a planner that reads in the record what comes next.
"""

from __future__ import annotations

import numpy as np

from deploy.planner.loads import ExpectedLoad
from predictor.records import Records


class Foresight:
    """What a record says of the `horizon_s` seconds after each moment of it, counted from its first row on."""

    def __init__(self, records: Records, horizon_s: float) -> None:
        """Raise ValueError for a record without a step."""
        if not len(records):
            raise ValueError("a record without a step foresees nothing")
        self._times = records.time_s - records.time_s[0]
        counts = (records.prefill_counts + records.decode_counts).astype(np.int64)
        self._sums = np.concatenate([np.zeros_like(counts[:1]), np.cumsum(counts, axis=0)])
        self._horizon_s = horizon_s

    def expected(self, elapsed_s: float) -> ExpectedLoad:
        """What comes after `elapsed_s` seconds; nothing after the record's end."""
        first, last = np.searchsorted(self._times, [elapsed_s, elapsed_s + self._horizon_s], side="right")
        rows = (self._sums[last] - self._sums[first]).astype(np.float64)
        return ExpectedLoad(rows, rows, (last - first) / self._horizon_s, np.where(rows > 0, 0.0, elapsed_s))
