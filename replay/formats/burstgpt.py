"""BurstGPT: ``Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type``, seconds.

Requests that failed have 0 response tokens. Newer files have ``Session ID`` and ``Elapsed time`` in between; columns
are found by their names.
"""

from __future__ import annotations

import pyarrow as pa

from replay.formats.columns import seconds_ns
from replay.formats.csv_rows import CsvFormat


def _seconds(text: str) -> int:
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError(f"Timestamp is no number of seconds: {text[:40]!r}") from None
    return seconds_ns("Timestamp", seconds)


FORMAT = CsvFormat(
    name="burstgpt",
    looks="CSV: Timestamp,...,Request tokens,Response tokens,...",
    time="Timestamp",
    prompt="Request tokens",
    answer="Response tokens",
    time_type=pa.float64(),
    time_ns=_seconds,
    time_fits=lambda text: True,
)
