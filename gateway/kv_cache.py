"""The paged KV cache: one pool of blocks per layer."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one token leaves in one layer's cache."""

    heads: int
    key_dim: int
    value_dim: int
    values_in_keys: bool = False
    """The values are the keys (latent attention) and take no room of their own."""

    @property
    def numbers(self) -> int:
        """Numbers a token takes."""
        return self.heads * (self.key_dim + (0 if self.values_in_keys else self.value_dim))


def blocks_in(gib: float, shapes: Mapping[int, LayerShape], dtype: torch.dtype, block_size: int) -> int:
    """How many blocks of `block_size` tokens fit in `gib` GiB; raise ValueError where not even one does."""
    block_bytes = sum(shape.numbers for shape in shapes.values()) * dtype.itemsize * block_size
    blocks = int(gib * 2**30 // block_bytes)
    if blocks < 1:
        raise ValueError(
            f"kv_cache_gib ({gib:g}) holds no block of this model's cache; one takes {block_bytes / 2**30:.6f} GiB"
        )
    return blocks


class KVCache:
    """Keys and values of `blocks` blocks for every layer of `shapes`, read and written by the block table.

    A layer's pool is [heads, blocks, block_size, dim], so that a gather moves whole blocks and comes out ready for a
    batched product. Memory starts as zeros and is not touched before it is used: slots behind a sequence's last token
    are read (and masked), so they must always hold finite numbers.
    """

    def __init__(
        self,
        shapes: Mapping[int, LayerShape],
        *,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.shapes = dict(shapes)
        self._keys = {
            layer: _zeros((s.heads, blocks, block_size, s.key_dim), dtype, device) for layer, s in shapes.items()
        }
        self._values = {
            layer: _zeros((s.heads, blocks, block_size, s.value_dim), dtype, device)
            for layer, s in shapes.items()
            if not s.values_in_keys
        }

    def slots(self, table: Sequence[int], start: int, count: int) -> list[int]:
        """Slot numbers of the tokens `start` to `start + count` of the sequence with the block table `table`."""
        size = self.block_size
        return [table[i // size] * size + i % size for i in range(start, start + count)]

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store rows: `slots` [T], `keys` [heads, T, key_dim], `values` [heads, T, value_dim] (unless in keys)."""
        self._keys[layer].flatten(1, 2).index_copy_(1, slots, keys)
        if layer in self._values:
            self._values[layer].flatten(1, 2).index_copy_(1, slots, values)

    def pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a layer, [heads, blocks, block_size, dim]."""
        keys = self._keys[layer]
        return keys, self._values.get(layer, keys)

    def read(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The contents of `blocks` [N] as keys [heads, N * block_size, key_dim] and values [.., value_dim]."""
        keys = self._keys[layer].index_select(1, blocks).flatten(1, 2)
        if layer in self._values:
            return keys, self._values[layer].index_select(1, blocks).flatten(1, 2)
        return keys, keys

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero `blocks`: a failed step may have left what is not finite, and later owners read slots before writing."""
        for pool in (*self._keys.values(), *self._values.values()):
            pool[:, list(blocks)] = 0


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Fresh anonymous pages are zeros that cost nothing until touched; torch.zeros would touch them all.
    count = torch.Size(shape).numel()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype).view(shape)
