"""Which cache block belongs to whom: bookkeeping without a tensor in sight."""

from __future__ import annotations


class BlockPool:
    """`total` equal blocks of `block_size` tokens each; every block is either free or in exactly one table."""

    def __init__(self, total: int, block_size: int) -> None:
        if total < 1 or block_size < 1:
            raise ValueError(f"a cache needs at least one block of one token, got {total} blocks of {block_size}")
        self.total = total
        self.block_size = block_size
        self._free = list(range(total - 1, -1, -1))  # low numbers first: memory is touched only as far as it is used

    @property
    def free(self) -> int:
        """Blocks in no table."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks in some table."""
        return self.total - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens take."""
        return -(-tokens // self.block_size)

    def grow(self, table: list[int], tokens: int) -> bool:
        """Extend `table` to hold `tokens` tokens; with too few free blocks, change nothing and return False."""
        missing = self.blocks_for(tokens) - len(table)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            table.append(self._free.pop())
        return True

    def release(self, table: list[int]) -> None:
        """Take back all blocks of `table` and empty it."""
        self._free.extend(reversed(table))
        table.clear()
