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
    """Rows attended together: n rows of each of B sequences."""

    rows: slice
    count: int
    """n"""
    blocks: torch.Tensor
    """[B, W]: the sequences' blocks, short tables padded"""
    positions: torch.Tensor
    """[B, n]"""
    lengths: torch.Tensor
    """[B]: cached tokens of each sequence, these rows included"""
    keys: int
    """The longest of them"""
    from_start: bool
    """The rows are the first of their sequences, and all there is of them."""

    @property
    def decodes(self) -> bool:
        """One row of each sequence."""
        return self.count == 1


def length_class(tokens: int, block_size: int) -> int:
    """Decoding sequences of one class are one product: lengths within a factor of two, so little of it is padding."""
    return (-(-tokens // block_size) - 1).bit_length()


def group_rows(
    chunks: Sequence[Chunk], block_size: int, device: torch.device | str = "cpu", *, by_length: bool = True
) -> list[RowGroup]:
    """Neighbours with alike numbers of rows and, `by_length`, lengths are one group; rows keep their order.

    Alike are decoding sequences of one length class, and longer chunks that take as many blocks.
    """

    def kind(chunk: Chunk) -> tuple[int, int]:
        if chunk.count > 1:
            return chunk.count, -(-(chunk.start + chunk.count) // block_size)
        return 1, length_class(chunk.start + 1, block_size) if by_length else 0

    groups: list[RowGroup] = []
    row = 0
    for _, members in itertools.groupby(chunks, kind):
        groups.append(_row_group(list(members), row, block_size, device))
        row = groups[-1].rows.stop
    return groups


def _row_group(chunks: list[Chunk], row: int, block_size: int, device: torch.device | str) -> RowGroup:
    count = chunks[0].count
    lengths = [chunk.start + count for chunk in chunks]
    width = -(-max(lengths) // block_size)
    # Short tables are padded with their own first block: read, masked, and never another sequence's.
    blocks = [[*chunk.table[:width], *[chunk.table[0]] * (width - len(chunk.table))] for chunk in chunks]
    positions = [list(range(chunk.start, chunk.start + count)) for chunk in chunks]
    return RowGroup(
        rows=slice(row, row + len(chunks) * count),
        count=count,
        blocks=torch.tensor(blocks, device=device),
        positions=torch.tensor(positions, device=device),
        lengths=torch.tensor(lengths, device=device),
        keys=max(lengths),
        from_start=all(chunk.start == 0 for chunk in chunks),
    )
