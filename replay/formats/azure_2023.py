"""Azure's LLM inference traces of 2023: ``2023-11-16 18:15:46.6805900,374,44``, no time zone, seven digits."""

from __future__ import annotations

import pyarrow as pa

from replay.formats.csv_rows import CsvFormat
from replay.formats.timestamps import is_naive, naive_ns

FORMAT = CsvFormat(
    name="azure-2023",
    looks="CSV: TIMESTAMP,ContextTokens,GeneratedTokens, no time zone",
    time="TIMESTAMP",
    prompt="ContextTokens",
    answer="GeneratedTokens",
    time_type=pa.timestamp("ns"),
    time_ns=naive_ns,
    time_fits=is_naive,
)
