"""Memory-mapped weights, made ready to be read."""

import ctypes
import mmap

import torch

_POPULATE_READ = 22  # MADV_POPULATE_READ, since Linux 5.14; the mmap module does not name it
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def populate(weight: torch.Tensor) -> None:
    """Map all pages of a dense CPU tensor now: else the first reads take a page fault for every few of them.

    Only an advice: where the kernel does not know it, the pages come as they are read.
    """
    if weight.device.type != "cpu" or not weight.numel():
        return
    start = weight.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    end = weight.data_ptr() + weight.nbytes
    _madvise(start, end - start, _POPULATE_READ)
