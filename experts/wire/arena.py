"""Memory shared by a gateway and the replicas on its host: an area of rows and, of the same size, an area of results.

An anonymous memfd: it has no name in any file system, so nothing is left behind however the processes end.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import warnings

import torch

from experts.wire.frame import DTYPES, FrameError

_ids = itertools.count(1)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_MIN_CAPACITY = 1 << 20


class Arena:
    """Two areas of `capacity` bytes each: rows first, results second.

    The sealed size makes a mapping safe to touch: the other side cannot cut the file short under it.
    """

    def __init__(self, fd: int, size: int, ident: int) -> None:
        self.fd = fd
        self.id = ident
        self.capacity = size // 2
        self._map = mmap.mmap(fd, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about buffers it may not own; this one is writable
            self._numbers = {dtype: torch.frombuffer(self._map, dtype=dtype) for dtype in DTYPES}

    @classmethod
    def create(cls, needed: int) -> Arena:
        """A new arena whose areas hold at least `needed` bytes each."""
        capacity = max(_MIN_CAPACITY, 1 << (needed - 1).bit_length())
        fd = os.memfd_create("evermoe-rows", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, 2 * capacity)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return cls(fd, 2 * capacity, next(_ids))

    @classmethod
    def attach(cls, fd: int, size: int, ident: int) -> Arena:
        """Map the arena another process made; raise FrameError where the descriptor is not what was announced."""
        if os.fstat(fd).st_size != size or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise FrameError("an arena of another size than announced, or not sealed")
        return cls(fd, size, ident)

    @property
    def memory(self) -> torch.Tensor:
        """Both areas, as bytes."""
        return self._numbers[torch.float32].view(torch.uint8)

    def rows(self, offset: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """A [rows, width] view at `offset` bytes of the rows area; raise FrameError where it does not fit."""
        return self._view(offset, rows, width, dtype, 0)

    def results(self, offset: int, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """A [rows, width] view at `offset` bytes of the results area; raise FrameError where it does not fit."""
        return self._view(offset, rows, width, dtype, self.capacity)

    def _view(self, offset: int, rows: int, width: int, dtype: torch.dtype, base: int) -> torch.Tensor:
        end = offset + rows * width * dtype.itemsize
        if end > self.capacity or offset % dtype.itemsize:
            raise FrameError(f"rows at {offset}..{end} do not fit an arena of {self.capacity} bytes")
        # One operation instead of three views: a replica comes here with cold caches, layer after layer.
        return self._numbers[dtype].as_strided((rows, width), (width, 1), (base + offset) // dtype.itemsize)

    def close(self) -> None:
        """Give the descriptor back; the memory goes with the last view of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def bytes_of(rows: torch.Tensor) -> memoryview:
    """The memory of contiguous CPU `rows` [N, width], to send from or to receive into."""
    return rows.view(torch.uint8).numpy().data.cast("B")
