"""Safetensors files written front to back, in pieces, with a running checksum, and continued after an interruption.

The safetensors library writes a file from tensors that are all in memory. Here the header, which needs only names,
dtypes and shapes, goes first, and the tensors follow one at a time. Format: https://github.com/huggingface/safetensors
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experts.checkpoint import DTYPES

_ALIGNMENT = 64  # of the first tensor: a cache line, so that rows of the memory map start well
_PIECE = 8 << 20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def encode_header(specs: Sequence[TensorSpec]) -> bytes:
    """The bytes in front of the data of a file that holds `specs` in this order without gaps.

    Raises:
        ValueError: a tensor would not start at a multiple of its item size; put wider dtypes first.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        if offset % spec.dtype.itemsize:
            raise ValueError(f"tensor {spec.name} would not be aligned to its dtype {spec.dtype}")
        end = offset + spec.nbytes
        entries[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class SafetensorsWriter:
    """Appends tensors to one file, in the order of `specs`; the file is open only while a tensor is written."""

    def __init__(self, path: Path, specs: Sequence[TensorSpec]) -> None:
        self.path = path
        self._specs = tuple(specs)
        self._header = encode_header(specs)
        self._digest = hashlib.sha256()
        self.count = 0  # tensors written so far
        self.size = 0  # bytes written so far

    @property
    def total(self) -> int:
        """Bytes of the finished file."""
        return len(self._header) + sum(spec.nbytes for spec in self._specs)

    @property
    def sha256(self) -> str:
        """Checksum (hex) of the bytes written so far."""
        return self._digest.hexdigest()

    def start(self) -> None:
        """Create the file, or empty it, and write the header."""
        self._digest, self.size, self.count = hashlib.sha256(), 0, 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("wb") as file:
            self._emit(file.fileno(), self._header)

    def resume(self, count: int, sha256: str) -> bool:
        """Continue after the first `count` tensors, if header and tensors so far have this checksum.

        What follows them in the file is cut off. Returns False, and changes nothing, if they are not there.
        """
        size = len(self._header) + sum(spec.nbytes for spec in self._specs[:count])
        digest = hashlib.sha256()
        try:
            with self.path.open("rb+") as file:
                for left in range(size, 0, -_PIECE):
                    digest.update(file.read(min(left, _PIECE)))
                if digest.hexdigest() != sha256:
                    return False
                file.truncate(size)
        except OSError:
            return False
        self._digest, self.size, self.count = digest, size, count
        return True

    def append(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor, cast to its declared dtype piece by piece.

        Raises:
            ValueError: `name` is not the next tensor or has another shape.
        """
        spec = self._specs[self.count] if self.count < len(self._specs) else None
        if spec is None or name != spec.name or tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{self.path.name}: expected {spec}, got {name} {tuple(tensor.shape)}")
        flat, step = tensor.reshape(-1), _PIECE // spec.dtype.itemsize
        with self.path.open("rb+") as file:
            os.lseek(file.fileno(), self.size, os.SEEK_SET)
            for start in range(0, flat.numel(), step):
                piece = flat[start : start + step].to(spec.dtype).contiguous()
                self._emit(file.fileno(), piece.view(torch.uint8).numpy().data)
        self.count += 1

    def _emit(self, descriptor: int, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self.size += len(data)
        while data:
            data = data[os.write(descriptor, data) :]
