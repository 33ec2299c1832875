"""Memory-mapped weights: mapped slice by slice, made ready to be read, given back."""

import ctypes
import mmap
from pathlib import Path

import torch

_POPULATE_READ = 22  # MADV_POPULATE_READ, since Linux 5.14; the mmap module does not name it
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class MappedRange:
    """Bytes `begin` to `end` of `file`, mapped apart from the rest: unmapped with the last tensor taken from it."""

    def __init__(self, file: Path, begin: int, end: int) -> None:
        self._base = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with file.open("rb") as stream:
            # A private map that nobody writes to shares its pages; torch warns of those that can't be written.
            self._map = mmap.mmap(stream.fileno(), end - self._base, access=mmap.ACCESS_COPY, offset=self._base)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], begin: int) -> torch.Tensor:
        """The tensor that begins at byte `begin` of the file."""
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin - self._base).view(shape)


def populate(weight: torch.Tensor) -> None:
    """Map all pages of a dense CPU tensor now: else the first reads take a page fault for every few of them.

    Only an advice: where the kernel does not know it, the pages come as they are read.
    """
    _advise(weight, _POPULATE_READ)


def discard(weight: torch.Tensor) -> None:
    """Give back the pages of a tensor that lies in a `MappedRange`, and nowhere else; reading brings them back."""
    _advise(weight, mmap.MADV_DONTNEED)


def trim() -> None:
    """Give memory that was freed back to the system: the allocator would keep much of it."""
    if hasattr(_libc, "malloc_trim"):  # glibc's
        _libc.malloc_trim(0)


def _advise(weight: torch.Tensor, advice: int) -> None:
    if weight.device.type != "cpu" or not weight.numel():
        return
    start = weight.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = weight.data_ptr() + weight.nbytes
    _libc.madvise(start, end - start, advice)
