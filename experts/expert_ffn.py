"""The compiled form of a layer's experts and of the sum over top-k (expert_ffn.cpp), where it was built."""

from collections.abc import Sequence
from pathlib import Path

import torch

from experts import native_code
from experts.matrix import PackedMatrix

_SOURCE = Path(__file__).with_suffix(".cpp")
_STEP = 32
"""Widths must be a multiple of two of the widest vectors, in numbers."""
_DTYPES = (torch.bfloat16, torch.float32)
_loaded = False


def library(folder: Path) -> Path:
    """The kernels' file in `folder`."""
    return native_code.library(_SOURCE, folder)


def build(folder: Path) -> None:
    """Compile the kernels into `folder`, whole or not at all; raise RuntimeError where that can't be done."""
    native_code.build(_SOURCE, folder)


def load(folder: Path) -> bool:
    """Load the kernels from `folder` if they are there; whether they are loaded now."""
    global _loaded
    _loaded = _loaded or native_code.load(_SOURCE, folder)
    return _loaded


def takes(rows: torch.Tensor, inner: int) -> bool:
    """Whether the kernels are there and compute rows like `rows [N, H]`, with `inner` numbers between the products."""
    fits = rows.shape[-1] % _STEP == 0 and inner % _STEP == 0
    return _loaded and fits and rows.device.type == "cpu" and rows.dtype in _DTYPES


def expert_ffn(
    rows: torch.Tensor,
    counts: Sequence[int],
    up: Sequence[PackedMatrix],
    down: Sequence[PackedMatrix],
    out: torch.Tensor,
) -> None:
    """`down(silu(gate) * up)` of rows `[N, H]` sorted by expert, `counts[e]` of each, into `out [N, H]`."""
    torch.ops.evermoe.expert_ffn(rows, counts, [m.weight for m in up], [m.weight for m in down], out)


def weighted_sum(rows: torch.Tensor, place: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`out[t] = sum over k of weights[t, k] * rows[place[t * K + k]]` in fp32, k by k; `[T, H]` in the rows' dtype."""
    out: torch.Tensor = torch.ops.evermoe.weighted_sum(rows, place, weights.float().contiguous())
    return out
