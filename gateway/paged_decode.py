"""The compiled kernel that attends decoding rows over the paged cache (paged_decode.cpp), where it was built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from experts import native_code

_SOURCE = Path(__file__).with_suffix(".cpp")
_LANES = 16
"""Head dimensions must be a multiple of the widest vector, in numbers."""
NOTHING = torch.empty(0, 0, 0, 0, dtype=torch.int64)
"""In place of the pool of a layer that is not the kernel's."""
_kernel: Callable[..., torch.Tensor] | None = None
"""Set once, when it is loaded."""


def library(folder: Path) -> Path:
    """The kernel's file in `folder`."""
    return native_code.library(_SOURCE, folder)


def build(folder: Path) -> None:
    """Compile the kernel into `folder`, whole or not at all; raise RuntimeError where that can't be done."""
    native_code.build(_SOURCE, folder)


def load(folder: Path) -> bool:
    """Load the kernel from `folder` if it is there; whether it is loaded now."""
    global _kernel
    if _kernel is None and native_code.load(_SOURCE, folder, "paged_decode"):
        _kernel = torch.ops.evermoe.paged_decode.default
    return loaded()


def loaded() -> bool:
    """Whether this process has the kernel."""
    return _kernel is not None


def takes(keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the kernel is there and attends over pools like `keys` and `values` [heads, blocks, block_size, dim]."""
    return loaded() and keys.device.type == "cpu" and keys.shape[-1] % _LANES == 0 and values.shape[-1] % _LANES == 0


def paged_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One row of each of B sequences over its own blocks.

    Queries [Hq, B, Dk], pools [Hkv, blocks, block_size, D], block tables [B, W] and lengths [B] (int64), an additive
    mask [B, S] and sinks [Hq] in fp32 or None; outputs [B, Hq, Dv].
    """
    assert _kernel is not None
    return _kernel(query, keys, values, tables, lengths, scaling, mask, sinks)


def answer_attention(
    slots: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
) -> None:
    """Let compiled layers of this thread attend without Python, in a step of decoding rows only.

    Slots of the new rows [T], block tables [T, W] and lengths [T] (int64), each layer's pools; layers whose pools are
    `NOTHING` go on asking Python.
    """
    torch.ops.evermoe.decode_step.default(slots, tables, lengths, keys, values)


def ask_python() -> None:
    """Let compiled layers of this thread ask Python again."""
    answer_attention(NOTHING, NOTHING, NOTHING, [], [])
