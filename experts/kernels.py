"""The compiled arithmetic of experts and fixed matrices (kernels.cpp), where it was built.

Weights stay as they lie in memory: nothing is packed, and processes of one host share the memory map.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from experts import native_code

_SOURCE = Path(__file__).with_suffix(".cpp")
_STEP = 32
"""Widths must be a multiple of two of the widest vectors, in numbers."""
_FEW_ROWS = 16
"""Beyond this many rows oneDNN is faster where the processor multiplies matrices (AMX)."""
_LOOK_S = 5.0
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
    _loaded = _loaded or native_code.load(_SOURCE, folder, "expert_ffn")
    return loaded()


def loaded() -> bool:
    """Whether this process has the kernels."""
    return _loaded


def share(threads: int) -> None:
    """Let so many threads share each operation of the kernels, in the whole process; at first one does it all."""
    _operator("share")(threads)


@contextmanager
def loading(folder: Path, threads: int) -> Iterator[None]:
    """The kernels are loaded for so many threads: at once, or meanwhile, when another process has compiled them."""
    stop = threading.Event()

    def loaded_now() -> bool:
        if load(folder):
            share(threads)
        return loaded()

    def look() -> None:
        while not stop.wait(_LOOK_S) and not loaded_now():
            pass

    thread = threading.Thread(target=look, name="load-kernels", daemon=True)
    if not loaded_now():
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join()


def multiplies(weight: torch.Tensor) -> bool:
    """Whether the kernels are there and read weights like `weight [out, in]`."""
    return (
        _loaded
        and weight.device.type == "cpu"
        and weight.shape[0] % _STEP == weight.shape[1] % _STEP == 0
        and weight.is_contiguous()
        and _has(weight.dtype)
    )


def serve(
    descriptor: int,
    arena: int,
    memory: torch.Tensor,
    slices: Iterable[tuple[int, int]],
    up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
    tally: torch.Tensor,
    stamp: int,
) -> None:
    """Answer calls of `slices` (layer, expert) on a socket, their rows in `memory [bytes]` of the arena with a number.

    Returns when a frame comes that is none of these, or the connection ends; nothing of it has been read then. Returns
    soon when `stamp` is no longer the first number of `tally` (see `experts.tally`), where calls are counted.
    """
    places = list(chain.from_iterable(slices))
    _operator("serve")(descriptor, arena, memory, places, up, down, _most_rows(), tally, stamp)


def few(rows: int) -> bool:
    """Whether the kernels are the fastest way for so many rows."""
    return rows <= _most_rows()


def sums(rows: torch.Tensor) -> bool:
    """Whether the kernels are there and sum rows like `rows [N, H]`."""
    return _loaded and rows.device.type == "cpu" and rows.shape[-1] % _STEP == 0 and _has(rows.dtype)


def expert_ffn(
    rows: torch.Tensor,
    counts: Sequence[int],
    up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
    out: torch.Tensor,
) -> None:
    """`down(silu(gate) * up)` of rows `[N, H]` sorted by expert, `counts[e]` of each, into `out [N, H]`.

    Weights `up[e] [2W, H]` (gate above up) and `down[e] [H, W]`.
    """
    _operator("expert_ffn")(rows, counts, up, down, out)


def mixture(
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: Sequence[torch.Tensor],
    down: Sequence[torch.Tensor],
) -> torch.Tensor:
    """What `expert_ffn` and `weighted_sum` make of `hidden [T, H]`, sent to the experts `index [T, K]`: `[T, H]`."""
    out: torch.Tensor = _operator("mixture")(hidden, index, weights.float().contiguous(), up, down)
    return out


def product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`rows @ weight.T + bias`: rows `[..., in]` to `[..., out]`."""
    result: torch.Tensor = _operator("product")(rows, weight, bias)
    return result


def answer_products(weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor], first: Sequence[int]) -> None:
    """Let compiled layers of this thread multiply without Python: layer l by `weights[first[l] : first[l + 1]]`.

    Each `[out, in]`, or empty for one that Python must be asked for; an empty bias is none.
    """
    _operator("products_of")(weights, biases, first, _most_rows())


def weighted_sum(rows: torch.Tensor, place: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`out[t] = sum over k of weights[t, k] * rows[place[t * K + k]]` in fp32, k by k; `[T, H]` in the rows' dtype."""
    out: torch.Tensor = _operator("weighted_sum")(rows, place, weights.float().contiguous())
    return out


@functools.cache
def _operator(name: str) -> Callable[..., Any]:
    """Looked up once: that takes as long as a small operation."""
    operator: Callable[..., Any] = getattr(torch.ops.evermoe, name).default
    return operator


@functools.cache
def _has(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16) and bool(_operator("multiplies")(dtype))


@functools.cache
def _most_rows() -> int:
    return _FEW_ROWS if torch.cpu._is_amx_tile_supported() else 1 << 31
