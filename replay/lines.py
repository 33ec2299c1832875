"""Large text files as blocks of whole lines, plain or gzipped, in constant memory."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from replay.trace import TraceError

BLOCK_BYTES = 4 << 20
_LONGEST_LINE = 64 << 20
_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Block:
    """Whole lines of a file."""

    first_line: int
    """The number of its first line, from 1"""
    data: bytes
    ended: bool
    """Whether its last line has an end: only the last block of a file may do without"""


def read_blocks(path: Path, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """The lines of the file `path`, some megabytes at a time.

    Raise TraceError for a file that is not there, is cut off in the middle of its compression, or has no lines.
    """
    rest, line, at_start = b"", 1, True
    with _opened(path) as file:
        while part := _read(file, max(block_bytes, len(_MARK)), path, line):
            if at_start:  # some programs begin a file with a byte order mark
                part, at_start = part.removeprefix(_MARK), False
            lines, end, tail = part.rpartition(b"\n")
            if not end:
                rest += part
                if len(rest) > _LONGEST_LINE:
                    raise TraceError(f"{path}:{line}: a line of more than {_LONGEST_LINE >> 20} MiB: this is no trace")
                continue
            data, rest = rest + lines + end, tail
            yield Block(line, data, True)
            line += data.count(b"\n")
    if rest:
        yield Block(line, rest, False)


def _opened(path: Path) -> BinaryIO:
    try:
        with path.open("rb") as probe:
            zipped = probe.read(2) == b"\x1f\x8b"
        return cast(BinaryIO, gzip.open(path)) if zipped else path.open("rb")
    except OSError as error:
        raise TraceError(f"{path} can't be read ({error.strerror}): give the file of a trace") from error


def _read(file: BinaryIO, size: int, path: Path, line: int) -> bytes:
    try:
        return file.read(size)
    except (EOFError, OSError, zlib.error) as error:
        raise TraceError(f"{path} is damaged or cut off behind line {line} ({error}); get it again") from error
