"""Rows of CSV files: three columns wanted, named in the header, wherever they stand."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import csv as arrow_csv

from replay.formats.columns import Columns, Row, RowReader, checked_columns, seconds_column, whole_number


def header_names(header: str) -> list[str]:
    """The names of the columns."""
    return [name.strip() for name in next(csv.reader([header]), [])]


@dataclass(frozen=True)
class CsvFormat:
    """A format whose files are CSV with a header."""

    name: str
    looks: str
    time: str
    """The column with the time, and those with the lengths of prompt and answer:"""
    prompt: str
    answer: str
    time_type: pa.DataType
    """What Arrow reads the time as: a timestamp, or float64 for seconds"""
    time_ns: Callable[[str], int]
    """The same of one field; raise ValueError with what is wrong with it."""
    time_fits: Callable[[str], bool]
    """Whether the first row's time is of this format: two of them share their header."""
    header_lines: int = 1

    def recognises(self, head: Sequence[str]) -> bool:
        """By the names in the header, and the time in the first row where there is one."""
        names = header_names(head[0])
        if not {self.time, self.prompt, self.answer} <= set(names):
            return False
        fields = next(csv.reader(head[1:2]), [])
        at = names.index(self.time)
        return at >= len(fields) or self.time_fits(fields[at])

    def reader(self, header: str) -> RowReader:
        """What reads a file with this header."""
        return _CsvReader(self, header_names(header))


class _CsvReader:
    def __init__(self, form: CsvFormat, names: list[str]) -> None:
        self._form = form
        self._names = names
        self._at = tuple(names.index(name) for name in (form.time, form.prompt, form.answer))
        unique = [f"{number}" for number in range(len(names))]  # a header may have a name twice
        self._wanted = [unique[at] for at in self._at]
        types = dict(zip(self._wanted, (form.time_type, pa.int64(), pa.int64()), strict=True))
        self._reading = arrow_csv.ReadOptions(column_names=unique, use_threads=False, block_size=64 << 20)
        self._conversion = arrow_csv.ConvertOptions(column_types=types, include_columns=self._wanted)

    def block(self, data: bytes) -> Columns:
        table = arrow_csv.read_csv(
            pa.BufferReader(data), read_options=self._reading, convert_options=self._conversion
        ).combine_chunks()
        if table.num_rows != data.count(b"\n") or any(column.null_count for column in table.columns):
            raise ValueError("lines that are no rows, or fields without a value")
        time, prompt, answer = (_numbers(table[name]) for name in self._wanted)
        return checked_columns(Columns(_nanoseconds(time), prompt, answer))

    def row(self, line: str) -> Row:
        fields = next(csv.reader([line]), [])
        if len(fields) != len(self._names):
            raise ValueError(f"{len(fields)} columns instead of {len(self._names)}")
        time, prompt, answer = (fields[at].strip() for at in self._at)
        form = self._form
        return Row(form.time_ns(time), whole_number(form.prompt, prompt), whole_number(form.answer, answer))


def _numbers(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    numbers: npt.NDArray[Any] = column.to_numpy()
    return numbers


def _nanoseconds(time: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    if time.dtype == np.float64:
        return seconds_column(time)
    return time.astype("datetime64[ns]").view(np.int64)
