"""The compiled kernel that attends decoding rows over the paged cache (paged_decode.cpp), where it was built."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from gateway import native_code

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_suffix(".cpp")
_LANES = 16
"""Head dimensions must be a multiple of the widest vector, in numbers."""
_kernel: Callable[..., torch.Tensor] | None = None
"""Set once, when it is loaded."""


def library(folder: Path) -> Path:
    """The kernel's file in `folder`: named by what it is made of and for."""
    made_of = f"{native_code.made_for()} {_SOURCE.read_text()}"
    return folder / f"paged_decode-{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.so"


def build(folder: Path) -> None:
    """Compile the kernel into `folder`, whole or not at all; raise RuntimeError where that can't be done."""
    from torch._inductor import cpp_builder, cpu_vec_isa

    native_code.need_compiler()
    target = library(folder)
    if target.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder, suffix=f".{os.getpid()}") as aside:
        builder = cpp_builder.CppBuilder(
            name="paged_decode",
            sources=str(_SOURCE),
            output_dir=aside,
            BuildOption=cpp_builder.CppTorchOptions(vec_isa=cpu_vec_isa.pick_vec_isa()),
        )
        builder.build()
        Path(builder.get_target_file_path()).replace(target)


def load(folder: Path) -> bool:
    """Load the kernel from `folder` if it is there; whether it is loaded now."""
    global _kernel
    file = library(folder)
    if _kernel is None and file.exists():
        try:
            if not hasattr(torch.ops.evermoe, "paged_decode"):  # a process registers it once
                torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
            _kernel = torch.ops.evermoe.paged_decode.default
        except (OSError, AttributeError) as error:
            log.warning("decoding rows attend without the compiled kernel: %s can't be loaded (%s)", file, error)
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
