"""Frames of the data plane: a fixed 48-byte header, then the segments; no pickle anywhere.

    CALL     gateway -> replica   run `segments` of one layer on the rows at `offset`
    REPLY    replica -> gateway   the results lie at the same offset of the results area; `aux`: compute time, ns
    ERROR    replica -> gateway   `aux` bytes of UTF-8 follow: why the call was not run
    ATTACH   gateway -> replica   a new shared arena of `aux` bytes, its descriptor rides along; drop the old

Where no memory can be shared (`arena` is INLINE) the rows themselves follow the frame, in both directions.
"""

from __future__ import annotations

import dataclasses
import enum
import struct

import torch

HEADER = struct.Struct("<4sBBHHHIQQIIQ")
SEGMENT = struct.Struct("<II")
MAGIC = b"EVMR"
INLINE = 0xFFFFFFFF
MAX_SEGMENTS = 65_535
MAX_PAYLOAD = 1 << 30
MAX_ERROR = 4096

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Segment = tuple[int, int]
"""(expert, rows): `rows` consecutive rows go through `expert`."""


class Kind(enum.IntEnum):
    """What a frame asks or answers."""

    CALL = 1
    REPLY = 2
    ERROR = 3
    ATTACH = 4


_KINDS = frozenset(Kind)


class FrameError(ConnectionError):
    """The bytes received are no frame of this protocol: the connection is of no further use."""


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """One frame without its payload. `rows` x `width` numbers of `dtype`; `offset` in bytes into the arena."""

    kind: Kind
    seq: int
    layer: int = 0
    dtype: torch.dtype = torch.float32
    arena: int = INLINE
    offset: int = 0
    rows: int = 0
    width: int = 0
    aux: int = 0
    segments: tuple[Segment, ...] = ()

    @property
    def payload(self) -> int:
        """Bytes that `rows` take."""
        return self.rows * self.width * self.dtype.itemsize

    def pack(self) -> bytes:
        """The header and the segments as bytes."""
        head = HEADER.pack(
            MAGIC, self.kind, DTYPES.index(self.dtype), self.layer, len(self.segments), 0,
            self.arena, self.seq, self.offset, self.rows, self.width, self.aux,
        )  # fmt: skip
        return head + b"".join(SEGMENT.pack(*segment) for segment in self.segments)


def segment_bytes(header: bytes | bytearray) -> int:
    """How many bytes of segments follow this `header`; raise FrameError where it is none."""
    magic, kind, dtype, _, segments, *_ = HEADER.unpack(header)
    if magic != MAGIC or kind not in _KINDS or dtype >= len(DTYPES):
        raise FrameError("garbage instead of a frame")
    return int(segments) * SEGMENT.size


def unpack(header: bytes | bytearray, tail: bytes | bytearray = b"") -> Frame:
    """The frame of a `header` (48 bytes) and its segments' bytes; raise FrameError where they contradict each other."""
    if len(tail) != segment_bytes(header):
        raise FrameError("a frame with missing segments")
    _, kind, dtype, layer, _, _, arena, seq, offset, rows, width, aux = HEADER.unpack(header)
    frame = Frame(
        Kind(kind), seq, layer, DTYPES[dtype], arena, offset, rows, width, aux, tuple(SEGMENT.iter_unpack(tail))
    )  # fmt: skip
    if frame.payload > MAX_PAYLOAD:
        raise FrameError(f"a frame of {frame.payload} bytes: at most {MAX_PAYLOAD} are taken")
    if frame.kind is Kind.CALL and sum(count for _, count in frame.segments) != rows:
        raise FrameError("a frame whose segments do not add up to its rows")
    if frame.kind is Kind.ERROR and aux > MAX_ERROR:
        raise FrameError("a frame with an oversized error text")
    return frame
