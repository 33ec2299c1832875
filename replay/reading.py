"""Traces from files: streamed, each row checked, what is wrong counted and named.

A block of rows is read at once, by compiled code. Only where something in it is not as it should be are its lines
looked at one by one, so that the message can say which line, and why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from replay.formats import FORMATS, detect
from replay.formats.columns import NS, Columns, Row, RowReader, TraceFormat, gathered
from replay.lines import BLOCK_BYTES, Block, read_blocks
from replay.trace import Chunk, TraceError

_NAMED = 20


@dataclass
class Problems:
    """What was wrong with a trace's rows; rows that are wrong are left out."""

    path: Path
    strict: bool = False
    rows: int = 0
    """Rows read, good or not"""
    count: int = 0
    """Rows left out"""
    named: list[str] = field(default_factory=list)
    """The first of them: file, line and reason"""
    notes: list[str] = field(default_factory=list)
    """What is odd, but led to nothing being left out"""

    def add(self, line: int, why: str) -> None:
        """Count a row; raise TraceError where none may be wrong."""
        sentence = f"{self.path}:{line}: {why}"
        if self.strict:
            raise TraceError(f"{sentence}; without --strict such rows are left out and counted")
        self.count += 1
        if len(self.named) < _NAMED:
            self.named.append(sentence)


class Trace:
    """A trace in a file. Every iteration reads it again, and counts its `problems` anew."""

    def __init__(
        self,
        path: Path,
        *,
        name: str | None = None,
        strict: bool = False,
        in_order: bool = True,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        """`name` is a format's, or None to recognise it; without `in_order` rows may go back in time (to be sorted).

        Raise TraceError for a file that is empty, not there, or of no known format.
        """
        self.path = path
        self.problems = Problems(path, strict)
        self._in_order = in_order
        self._block_bytes = block_bytes
        head = _head(path, block_bytes)
        self.format = detect(str(path), head) if name is None else _called(name)
        if name is not None and not self.format.recognises(head):
            raise TraceError(f"{path} is not of format {name}: its first line is {head[0][:80]!r}")
        self._header = head[0]

    def __iter__(self) -> Iterator[Chunk]:
        self.problems = Problems(self.path, self.problems.strict)
        columns = self._columns(self.format.reader(self._header))
        yield from _since_first(columns)
        if not self.problems.rows:
            raise TraceError(f"{self.path} has a header and no rows: is it cut off?")
        if self.problems.count == self.problems.rows:
            raise TraceError(
                f"{self.path}: none of its {self.problems.rows} rows can be used; the first: {self.problems.named[0]}"
            )

    def _columns(self, reader: RowReader) -> Iterator[Columns]:
        latest: int | None = None
        for block in _without_header(read_blocks(self.path, self._block_bytes), self.format.header_lines):
            columns, lines = self._read(reader, block)
            self.problems.rows += len(lines)
            if self._in_order:
                columns, lines = self._ordered(columns, lines, latest)
            if len(lines):
                latest = int(columns.time_ns[-1])
                yield columns

    def _read(self, reader: RowReader, block: Block) -> tuple[Columns, npt.NDArray[np.int64]]:
        """The good rows of a block, and their lines' numbers."""
        if block.ended:
            try:
                columns = reader.block(block.data)
                return columns, block.first_line + np.arange(len(columns.time_ns))
            except (ValueError, OverflowError, pa.ArrowException):
                pass  # something is not as usual: look at each line
        return self._one_by_one(reader, block)

    def _one_by_one(self, reader: RowReader, block: Block) -> tuple[Columns, npt.NDArray[np.int64]]:
        rows: list[Row] = []
        lines: list[int] = []
        texts = block.data.decode("utf-8", errors="replace").split("\n")
        for line, text in enumerate(texts[: None if texts[-1] else -1], block.first_line):
            if not (text := text.rstrip("\r")):
                continue
            try:
                rows.append(reader.row(text))
                lines.append(line)
            except ValueError as error:
                cut = "" if block.ended else "; the file ends in the middle of this line"
                self.problems.rows += 1
                self.problems.add(line, f"{error}{cut}")
        if not block.ended and lines and lines[-1] == block.first_line + len(texts) - 1:
            self.problems.notes.append(
                f"{self.path}:{lines[-1]}: the last line has no end; if the file is cut off, its last number may be too"
            )
        return gathered(rows), np.array(lines, np.int64)

    def _ordered(
        self, columns: Columns, lines: npt.NDArray[np.int64], latest: int | None
    ) -> tuple[Columns, npt.NDArray[np.int64]]:
        """Without rows that are earlier than any before them."""
        if not len(lines):
            return columns, lines
        time = columns.time_ns
        highest = np.maximum.accumulate(time if latest is None else np.maximum(time, latest))
        late = highest > time
        if not late.any():
            return columns, lines
        for row in np.flatnonzero(late).tolist():
            back = (highest[row] - time[row]) / NS
            self.problems.add(
                int(lines[row]), f"goes {back:g} s back in time; `evermoe trace convert --sort` puts rows in order"
            )
        keep = np.flatnonzero(~late)
        return _taken(columns, keep), lines[keep]


def _head(path: Path, block_bytes: int) -> list[str]:
    """The first two lines that say anything."""
    found: list[str] = []
    for block in read_blocks(path, min(block_bytes, 1 << 16)):
        texts = block.data.decode("utf-8", errors="replace").splitlines()
        found += islice((text for text in texts if text.strip()), 2 - len(found))
        if len(found) == 2:
            break
    if not found:
        raise TraceError(f"{path} is empty")
    return found


def _called(name: str) -> TraceFormat:
    for trace_format in FORMATS:
        if trace_format.name == name:
            return trace_format
    raise TraceError(f"unknown format '{name}': choose one of {', '.join(known.name for known in FORMATS)}")


def _without_header(blocks: Iterator[Block], lines: int) -> Iterator[Block]:
    """`blocks` without the first `lines` lines that say anything."""
    for block in blocks:
        while lines and block.data:
            first, _, rest = block.data.partition(b"\n")
            lines -= bool(first.strip())
            block = Block(block.first_line + 1, rest, block.ended)
        if block.data:
            yield block


def _since_first(columns: Iterator[Columns]) -> Iterator[Chunk]:
    """Time since the first request, seconds."""
    first: int | None = None
    for part in columns:
        first = int(part.time_ns[0]) if first is None else first
        seconds = (part.time_ns - first) / NS
        yield Chunk(seconds, part.prompt_tokens, part.answer_tokens, part.hash_ids, part.kinds)


def _taken(columns: Columns, keep: npt.NDArray[np.int64]) -> Columns:
    ids, kinds = columns.hash_ids, columns.kinds
    return Columns(
        columns.time_ns[keep],
        columns.prompt_tokens[keep],
        columns.answer_tokens[keep],
        None if ids is None else tuple(ids[row] for row in keep.tolist()),
        None if kinds is None else tuple(kinds[row] for row in keep.tolist()),
    )
