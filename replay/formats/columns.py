"""What a format has to offer, and what the rows of a file become first: columns, whatever the file looked like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

NS = 1_000_000_000
MOST_TOKENS = 100_000_000
"""A length above it is a mistake in the file."""
LATEST_S = 9.0e9
"""Nanoseconds of later times would not fit into 64 bits."""


class Row(NamedTuple):
    """One request as a file tells it."""

    time_ns: int
    """By whatever clock the file keeps"""
    prompt_tokens: int
    answer_tokens: int
    hash_ids: tuple[int, ...] | None = None
    kind: str | None = None


@dataclass(frozen=True)
class Columns:
    """N requests as a file tells them, valid one by one, their order not looked at yet."""

    time_ns: npt.NDArray[np.int64]
    prompt_tokens: npt.NDArray[np.int64]
    answer_tokens: npt.NDArray[np.int64]
    hash_ids: tuple[tuple[int, ...], ...] | None = None
    kinds: tuple[str, ...] | None = None


class TraceFormat(Protocol):
    """How one kind of file is read. Lines are numbered by who calls."""

    @property
    def name(self) -> str:
        """What it is called, on the command line too."""

    @property
    def looks(self) -> str:
        """How its files look, in a few words."""

    @property
    def header_lines(self) -> int:
        """Lines before the first request."""

    def recognises(self, head: Sequence[str]) -> bool:
        """Whether a file that begins with the lines `head` is one."""

    def reader(self, header: str) -> RowReader:
        """What reads a file with this first line."""


class RowReader(Protocol):
    """Reads one file's rows: all at once where they are as they should be, else each by itself."""

    def block(self, data: bytes) -> Columns:
        """All rows of whole lines; raise ValueError where any line is not as usual."""

    def row(self, line: str) -> Row:
        """The row of one line; raise ValueError with what is wrong with it, for people."""


def gathered(rows: Sequence[Row]) -> Columns:
    """The columns of `rows`."""
    ids = tuple(row.hash_ids or () for row in rows)
    kinds = tuple(row.kind or "" for row in rows)
    return Columns(
        np.array([row.time_ns for row in rows], np.int64),
        np.array([row.prompt_tokens for row in rows], np.int64),
        np.array([row.answer_tokens for row in rows], np.int64),
        ids if any(ids) else None,
        kinds if any(kinds) else None,
    )


def checked_columns(columns: Columns) -> Columns:
    """`columns`; raise ValueError where a length is none."""
    for lengths in (columns.prompt_tokens, columns.answer_tokens):
        if len(lengths) and not (lengths.min() >= 0 and lengths.max() <= MOST_TOKENS):
            raise ValueError("a length is none")
    return columns


def checked_length(name: str, value: int) -> int:
    """`value`; raise ValueError where it is no length."""
    if value < 0:
        raise ValueError(f"{name} is negative: {value}")
    if value > MOST_TOKENS:
        raise ValueError(f"{name} is no length: {value}")
    return value


def whole_number(name: str, text: str) -> int:
    """The length that `text` tells; raise ValueError where it tells none."""
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{name} is no whole number: {text[:40]!r}" if text else f"{name} is missing") from None
    return checked_length(name, value)


def seconds_ns(name: str, value: float) -> int:
    """Seconds as nanoseconds; raise ValueError for what is no time."""
    if not abs(value) < LATEST_S:  # `nan` is caught as well
        raise ValueError(f"{name} is no time: {value}")
    return round(value * NS)


def seconds_column(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """`seconds_ns` of a whole column."""
    if len(values) and not (np.abs(values) < LATEST_S).all():
        raise ValueError("a time is none")
    return np.rint(values * NS).astype(np.int64)
