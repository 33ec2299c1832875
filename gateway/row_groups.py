"""Which rows of a step attend together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of one sequence: tokens `start` to `start + count`, cached in the blocks `table`."""

    table: Sequence[int]
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows attended together: one row of each of B sequences (`decodes`), or n rows of one sequence."""

    rows: slice
    decodes: bool
    blocks: torch.Tensor
    """[B, W]: the sequences' blocks, short tables padded"""
    positions: torch.Tensor
    """[B, n]"""
    keys: int
    """Cached tokens of the longest sequence, these rows included"""


def length_class(tokens: int, block_size: int) -> int:
    """Decoding sequences of one class are one product: lengths within a factor of two, so little of it is padding."""
    return (-(-tokens // block_size) - 1).bit_length()


def group_rows(chunks: Sequence[Chunk], block_size: int, device: torch.device | str = "cpu") -> list[RowGroup]:
    """Neighbouring single rows of one length class together, every longer chunk alone; rows keep their order."""

    def kind(numbered: tuple[int, Chunk]) -> tuple[str, int]:
        index, chunk = numbered
        return ("decode", length_class(chunk.start + 1, block_size)) if chunk.count == 1 else ("chunk", index)

    groups: list[RowGroup] = []
    row = 0
    for _, members in itertools.groupby(enumerate(chunks), kind):
        groups.append(_row_group([chunk for _, chunk in members], row, block_size, device))
        row = groups[-1].rows.stop
    return groups


def _row_group(chunks: list[Chunk], row: int, block_size: int, device: torch.device | str) -> RowGroup:
    count = chunks[0].count
    keys = max(chunk.start + count for chunk in chunks)
    width = -(-keys // block_size)
    # Short tables are padded with their own first block: read, masked, and never another sequence's.
    blocks = [[*chunk.table[:width], *[chunk.table[0]] * (width - len(chunk.table))] for chunk in chunks]
    positions = [list(range(chunk.start, chunk.start + count)) for chunk in chunks]
    return RowGroup(
        rows=slice(row, row + len(chunks) * count),
        decodes=count == 1,
        blocks=torch.tensor(blocks, device=device),
        positions=torch.tensor(positions, device=device),
        keys=keys,
    )
