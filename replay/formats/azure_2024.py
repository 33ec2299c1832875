"""Azure's LLM inference traces of 2024: as in 2023, but ``2024-05-10 00:00:00.009930+00:00``; up to 16.8 M rows."""

from __future__ import annotations

import pyarrow as pa

from replay.formats.csv_rows import CsvFormat
from replay.formats.timestamps import has_offset, offset_ns

FORMAT = CsvFormat(
    name="azure-2024",
    looks="the same, with a time zone",
    time="TIMESTAMP",
    prompt="ContextTokens",
    answer="GeneratedTokens",
    time_type=pa.timestamp("ns", "UTC"),
    time_ns=offset_ns,
    time_fits=has_offset,
)
