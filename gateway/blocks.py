"""Which cache block belongs to whom, and what is still in it: bookkeeping without a tensor in sight."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b


class BlockPool:
    """`total` equal blocks of `block_size` tokens each.

    A block is *held* by one table or several, or *free*. Free blocks of which somebody may still find the contents by
    their key are *cached*: they are given out like the others, but last, and the least recently used first; of a chain
    its end before its beginning. Only what is complete gets a key, so a block with several holders is never written.

    `clear` is called with blocks whose contents are damaged when their last holder lets go of them.
    """

    def __init__(self, total: int, block_size: int, clear: Callable[[list[int]], None] = lambda blocks: None) -> None:
        if total < 1 or block_size < 1:
            raise ValueError(f"a cache needs at least one block of one token, got {total} blocks of {block_size}")
        self.total = total
        self.block_size = block_size
        self._clear = clear
        self._blank = list(range(total - 1, -1, -1))  # low numbers first: memory is touched only as far as it is used
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._holders = [0] * total
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._damaged: set[int] = set()

    @property
    def free(self) -> int:
        """Blocks in no table, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks in some table."""
        return self.total - self.free

    @property
    def cached(self) -> int:
        """Free blocks whose contents can still be found."""
        return len(self._cached)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that `tokens` tokens take."""
        return -(-tokens // self.block_size)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of `keys`, in order, up to the first that is not there; they are nobody's until `take`."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def cost(self, found: Iterable[int]) -> int:
        """How many fewer blocks are free once somebody takes `found`."""
        return sum(not self._holders[block] for block in found)

    def take(self, table: list[int], found: Sequence[int]) -> None:
        """Append blocks that `find` has just found to `table`."""
        for block in found:
            if not self._holders[block]:
                del self._cached[block]
            self._holders[block] += 1
        table.extend(found)

    def grow(self, table: list[int], tokens: int) -> bool:
        """Extend `table` to hold `tokens` tokens; with too few free blocks, change nothing and return False."""
        missing = self.blocks_for(tokens) - len(table)
        if missing > self.free:
            return False
        for _ in range(missing):
            block = self._blank.pop() if self._blank else self._evict()
            self._holders[block] = 1
            table.append(block)
        return True

    def publish(self, block: int, key: bytes) -> None:
        """Let `key` find `block`, which is held and complete; where another block has the key already, it keeps it."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, table: list[int]) -> None:
        """Let go of all blocks of `table` and empty it; what has a key can be found until its block is needed."""
        free = []
        for block in reversed(table):
            self._holders[block] -= 1
            if not self._holders[block]:
                free.append(block)
        if self._damaged and (damaged := self._damaged.intersection(free)):
            self._damaged -= damaged
            self._clear(sorted(damaged))
        for block in free:
            if block in self._key_of:
                self._cached[block] = None
            else:
                self._blank.append(block)
        table.clear()

    def discard(self, table: list[int]) -> None:
        """Like `release` for contents that are damaged: nobody finds them, and none is given out before it is clear."""
        for block in table:
            self._forget(block)
        self._damaged.update(table)
        self.release(table)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]


def extend_keys(keys: list[bytes], tokens: Sequence[int], blocks: int, block_size: int) -> None:
    """Lengthen `keys`, one for each leading block of `tokens`, to `blocks` of them.

    A key is a digest of the block's tokens and of the key before it, so it stands for everything up to its block's end.
    It is a cryptographic one: prompts come from strangers, and none must ever find the block of another text.
    """
    for index in range(len(keys), blocks):
        own = array("I", tokens[index * block_size : (index + 1) * block_size]).tobytes()
        keys.append(blake2b((keys[-1] if keys else b"") + own, digest_size=32).digest())
