"""The compiled kernel that attends decoding rows over the paged cache (paged_decode.cpp), where it was built."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import cast

import torch

_SOURCE = Path(__file__).with_suffix(".cpp")
_LANES = 16
"""Head dimensions must be a multiple of the widest vector, in numbers."""


def library(folder: Path) -> Path:
    """The kernel's file in `folder`: named by what it is made of and for."""
    made_of = f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()} {_SOURCE.read_text()}"
    return folder / f"paged_decode-{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.so"


def build(folder: Path) -> None:
    """Compile the kernel into `folder`, whole or not at all; raise RuntimeError where there is no compiler."""
    from torch._inductor import cpp_builder, cpu_vec_isa

    target = library(folder)
    if target.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        builder = cpp_builder.CppBuilder(
            name="paged_decode",
            sources=str(_SOURCE),
            output_dir=aside,
            BuildOption=cpp_builder.CppTorchOptions(vec_isa=cpu_vec_isa.pick_vec_isa()),
        )
        builder.build()
        shutil.copyfile(builder.get_target_file_path(), f"{target}.{os.getpid()}")
    Path(f"{target}.{os.getpid()}").replace(target)


def load(folder: Path) -> bool:
    """Load the kernel from `folder` if it is there; whether it is loaded now."""
    if not loaded() and library(folder).exists():
        torch.ops.load_library(str(library(folder)))  # type: ignore[no-untyped-call]
    return loaded()


def loaded() -> bool:
    """Whether this process has the kernel."""
    return hasattr(torch.ops.evermoe, "paged_decode")


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
    out = torch.ops.evermoe.paged_decode(query, keys, values, tables, lengths, scaling, mask, sinks)
    return cast(torch.Tensor, out)
