"""Mooncake: ``{"timestamp": ms, "input_length": ..., "output_length": ..., "hash_ids": [...]}``; prefixes are told."""

from __future__ import annotations

import msgspec

from replay.formats.columns import Row, seconds_ns
from replay.formats.json_rows import JsonFormat


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def _row(line: _Line) -> Row:
    time = seconds_ns("timestamp", line.timestamp / 1000)
    return Row(time, line.input_length, line.output_length, line.hash_ids)


FORMAT = JsonFormat(
    name="mooncake",
    looks="JSON lines: timestamp, input_length, output_length, hash_ids",
    schema=_Line,
    keys=frozenset({"timestamp", "input_length", "output_length"}),
    lengths=("input_length", "output_length"),
    as_row=_row,
)
