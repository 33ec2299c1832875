"""Rows of JSON lines: one object each, decoded into a typed struct."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from replay.formats.columns import Columns, Row, RowReader, checked_columns, checked_length, gathered


@dataclass(frozen=True)
class JsonFormat:
    """A format whose files have one JSON object a line."""

    name: str
    looks: str
    schema: type[msgspec.Struct]
    """What a line is decoded into"""
    keys: frozenset[str]
    """What tells the format from others"""
    lengths: tuple[str, str]
    """What the lengths of prompt and answer are called, for messages"""
    as_row: Callable[[Any], Row]
    """The row of a decoded line; raise ValueError with what is wrong with it."""
    header_lines: int = 0

    def recognises(self, head: Sequence[str]) -> bool:
        """By the keys of the first line."""
        try:
            first = msgspec.json.decode(head[0])
        except msgspec.MsgspecError:
            return False
        return isinstance(first, dict) and self.keys <= first.keys()

    def reader(self, header: str) -> RowReader:
        """What reads such a file."""
        return _JsonReader(self)


class _JsonReader:
    def __init__(self, form: JsonFormat) -> None:
        self._form = form
        self._decoder = msgspec.json.Decoder(form.schema)

    def block(self, data: bytes) -> Columns:
        decoded = self._decoder.decode_lines(data)
        if len(decoded) != data.count(b"\n"):
            raise ValueError("lines that are no rows")
        return checked_columns(gathered([self._form.as_row(line) for line in decoded]))

    def row(self, line: str) -> Row:
        try:
            row = self._form.as_row(self._decoder.decode(line))
        except msgspec.MsgspecError as error:
            raise ValueError(f"{str(error)[0].lower()}{str(error)[1:]}") from None
        for name, length in zip(self._form.lengths, row[1:3], strict=True):
            checked_length(name, length)
        return row
