"""Blocks are never lost, what is in them is found again, and nobody gets one that another still uses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.blocks import BlockPool, extend_keys


def keys_of(tokens: list[int], block_size: int) -> list[bytes]:
    keys: list[bytes] = []
    extend_keys(keys, tokens, len(tokens) // block_size, block_size)
    return keys


def test_a_pool_needs_a_block() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0, 16)


def filled(pool: BlockPool, tokens: list[int]) -> list[int]:
    """A table that holds `tokens`, found by their keys."""
    table: list[int] = []
    assert pool.grow(table, len(tokens))
    for block, key in zip(table, keys_of(tokens, pool.block_size), strict=False):
        pool.publish(block, key)
    return table


def test_what_was_released_is_found_again_and_does_not_count_as_used() -> None:
    pool = BlockPool(total=4, block_size=2)
    blocks = filled(pool, [1, 2, 3, 4, 5])
    held = list(blocks)
    pool.release(blocks)
    assert (pool.used, pool.free, pool.cached) == (0, 4, 2)
    assert pool.find(keys_of([1, 2, 3, 4, 9, 9], 2)) == held[:2]
    assert pool.find(keys_of([1, 2, 4, 3], 2)) == held[:1]
    assert pool.find(keys_of([3, 4], 2)) == []  # the same tokens behind others are another text


def test_a_cached_block_has_several_holders_and_is_free_after_the_last() -> None:
    pool = BlockPool(total=4, block_size=2)
    first = filled(pool, [1, 2, 3])
    second: list[int] = []
    pool.take(second, pool.find(keys_of([1, 2], 2)))
    assert second == first[:1]
    pool.release(first)
    assert pool.used == 1
    pool.release(second)
    assert pool.used == 0


def test_cached_blocks_go_last_the_oldest_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(total=5, block_size=1)
    old, new = filled(pool, [1, 2]), filled(pool, [7, 8])
    pool.release(old)
    pool.release(new)
    again: list[int] = []
    pool.take(again, pool.find(keys_of([1, 2], 1)))  # used again: now the old one is the younger
    pool.release(again)
    remaining = []
    table: list[int] = []
    for _ in range(5):
        assert pool.grow(table, len(table) + 1)
        remaining.append([len(pool.find(keys_of(text, 1))) for text in ([1, 2], [7, 8])])
    assert remaining == [[2, 2], [2, 1], [2, 0], [1, 0], [0, 0]]
    assert not pool.grow(table, 6)


def test_a_second_block_of_the_same_text_stays_its_owners_own() -> None:
    pool = BlockPool(total=4, block_size=2)
    first, second = filled(pool, [1, 2]), filled(pool, [1, 2])
    assert first != second
    kept = list(first)
    pool.release(second)
    assert (pool.used, pool.cached) == (1, 0)
    pool.release(first)
    assert pool.find(keys_of([1, 2], 2)) == kept


def test_damaged_blocks_are_found_by_nobody_and_cleared_when_the_last_lets_go() -> None:
    cleared: list[int] = []
    pool = BlockPool(4, 2, cleared.extend)
    first = filled(pool, [1, 2, 3])
    second: list[int] = []
    shared, own = first
    pool.take(second, pool.find(keys_of([1, 2], 2)))
    pool.discard(first)
    assert pool.find(keys_of([1, 2], 2)) == []
    assert cleared == [own]
    pool.release(second)
    assert cleared == [own, shared]
    assert pool.free == 4


def test_keys_tell_texts_apart_and_grow_with_them() -> None:
    texts = [[], [0], [1], [0, 0], [0, 1], [1, 0], [256], [65536], [2**31 + 5]]
    keys = [keys_of([*text, 0, 0], len(text) + 2)[0] for text in texts]
    assert len(set(keys)) == len(texts)
    grown = keys_of(list(range(10)), 4)
    extend_keys(grown, list(range(16)), 4, 4)
    assert grown == keys_of(list(range(16)), 4)


class PoolMachine(RuleBasedStateMachine):
    """Tables of texts over two letters; a dictionary of what each block holds stands for the tensors."""

    @initialize(total=st.integers(1, 12), block_size=st.integers(1, 3))
    def start(self, total: int, block_size: int) -> None:
        self.pool = BlockPool(total, block_size, self.clear)
        self.tables: list[tuple[list[int], list[int]]] = []  # blocks and the text in them
        self.holds: dict[int, tuple[int, ...] | None] = {}  # None: damaged

    def clear(self, blocks: list[int]) -> None:
        assert len(set(blocks)) == len(blocks)
        for block in blocks:
            assert not any(block in table for table, _ in self.tables)
            self.holds.pop(block, None)

    @rule(text=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def begin(self, text: list[int]) -> None:
        size = self.pool.block_size
        keys = keys_of(text, size)
        found = self.pool.find(keys)
        for index, block in enumerate(found):
            assert self.holds[block] == tuple(text[: (index + 1) * size])
        fresh = self.pool.blocks_for(len(text)) - len(found)
        if fresh + self.pool.cost(found) > self.pool.free:
            return
        free, cost = self.pool.free, self.pool.cost(found)
        table: list[int] = []
        self.pool.take(table, found)
        assert self.pool.free == free - cost
        assert self.pool.grow(table, len(text))
        assert table[: len(found)] == found
        for block in table[len(found) :]:  # nobody's: not another's, not damaged, and from now on not found
            assert not any(block in other for other, _ in self.tables)
            assert self.holds.get(block, ()) is not None
        for index in range(len(found), len(keys)):
            self.holds[table[index]] = tuple(text[: (index + 1) * size])
            self.pool.publish(table[index], keys[index])
        self.tables.append((table, text))

    @precondition(lambda self: self.tables)
    @rule(which=st.integers(0, 11), damaged=st.booleans())
    def end(self, which: int, damaged: bool) -> None:
        table, _ = self.tables.pop(which % len(self.tables))
        if damaged:
            for block in table:
                if not any(block in other for other, _ in self.tables):
                    self.holds[block] = None
            self.pool.discard(table)
        else:
            self.pool.release(table)
        assert not table

    @rule(tokens=st.integers(1, 60))
    def too_much_changes_nothing(self, tokens: int) -> None:
        free, cached, table = self.pool.free, self.pool.cached, [0]
        if self.pool.blocks_for(tokens) - 1 > free:
            assert not self.pool.grow(table, tokens)
            assert (self.pool.free, self.pool.cached, table) == (free, cached, [0])

    @invariant()
    def every_block_is_free_or_held(self) -> None:
        held = {block for table, _ in getattr(self, "tables", []) for block in table}
        if hasattr(self, "pool"):
            assert self.pool.used == len(held)
            assert self.pool.cached <= self.pool.free == self.pool.total - len(held)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        while self.tables:
            self.pool.release(self.tables.pop()[0])
        everything: list[int] = []
        assert self.pool.grow(everything, self.pool.total * self.pool.block_size)
        assert sorted(everything) == list(range(self.pool.total))


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


@given(st.lists(st.integers(0, 2**32 - 1), max_size=20), st.integers(1, 5))
def test_a_key_stands_for_everything_up_to_its_blocks_end(tokens: list[int], block_size: int) -> None:
    keys = keys_of(tokens, block_size)
    assert len(keys) == len(tokens) // block_size
    if keys:
        changed = [tokens[0] ^ 1, *tokens[1:]]
        assert not set(keys) & set(keys_of(changed, block_size))
