"""Which rows of a step attend together, and what each group knows about its sequences."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.row_groups import Chunk, RowGroup, group_rows, length_class

SIZE = 4


def chunk(start: int, count: int, first_block: int = 0) -> Chunk:
    """A chunk whose sequence has just the blocks it needs."""
    return Chunk(range(first_block, first_block + -(-(start + count) // SIZE)), start, count)


def counts(groups: list[RowGroup]) -> list[tuple[int, int]]:
    """Sequences and rows of each, by group."""
    return [(len(group.blocks), group.count) for group in groups]


def test_no_rows_are_no_groups() -> None:
    assert group_rows([], SIZE) == []


def test_equal_chunks_are_one_group() -> None:
    [group] = group_rows([chunk(0, 6), chunk(1, 6, 10), chunk(2, 6, 20)], SIZE)
    assert group.count == 6
    assert not group.decodes
    assert group.rows == slice(0, 18)
    assert group.positions.tolist() == [[*range(6)], [*range(1, 7)], [*range(2, 8)]]
    assert group.blocks.tolist() == [[0, 1], [10, 11], [20, 21]]
    assert group.lengths.tolist() == [6, 7, 8]
    assert group.keys == 8


def test_chunks_of_unlike_lengths_are_apart() -> None:
    assert counts(group_rows([chunk(0, 5), chunk(0, 5), chunk(0, 6)], SIZE)) == [(2, 5), (1, 6)]


def test_equal_chunks_that_read_unlike_numbers_of_blocks_are_apart() -> None:
    assert counts(group_rows([chunk(0, 4), chunk(1, 4)], SIZE)) == [(1, 4), (1, 4)]


def test_only_neighbours_are_grouped_so_that_rows_keep_their_order() -> None:
    groups = group_rows([chunk(0, 3), chunk(0, 2), chunk(0, 3)], SIZE)
    assert counts(groups) == [(1, 3), (1, 2), (1, 3)]
    assert [group.rows for group in groups] == [slice(0, 3), slice(3, 5), slice(5, 8)]


def test_decoding_sequences_of_one_length_class_are_one_group() -> None:
    lengths = [2, 3, 4, 5, 7, 8, 9, 13, 16, 17]
    groups = group_rows([chunk(length - 1, 1) for length in lengths], SIZE)
    assert [group.lengths.tolist() for group in groups] == [[2, 3, 4], [5, 7, 8], [9, 13, 16], [17]]
    assert all(group.decodes for group in groups)


def test_a_kernel_that_reads_each_as_far_as_it_goes_gets_them_in_one_group() -> None:
    [group] = group_rows([chunk(length - 1, 1) for length in (2, 8, 70)], SIZE, by_length=False)
    assert group.lengths.tolist() == [2, 8, 70]
    assert group.blocks.shape == (3, 18)


def test_chunks_are_never_grouped_with_decoding_sequences() -> None:
    assert counts(group_rows([chunk(3, 1), chunk(2, 2)], SIZE, by_length=False)) == [(1, 1), (1, 2)]


def test_groups_know_whether_their_rows_are_all_there_is() -> None:
    first, later, mixed = ([chunk(a, 3), chunk(b, 3)] for a, b in ((0, 0), (1, 1), (0, 1)))
    assert [group_rows(chunks, SIZE)[0].from_start for chunks in (first, later, mixed)] == [True, False, False]


def test_short_tables_are_padded_with_a_block_of_their_own_sequence() -> None:
    [group] = group_rows([chunk(11, 1, 30), chunk(8, 1, 40), chunk(2, 1, 50)], SIZE, by_length=False)
    assert group.blocks.tolist() == [[30, 31, 32], [40, 41, 42], [50, 50, 50]]


def test_tables_that_reach_beyond_the_rows_are_cut() -> None:
    [group] = group_rows([Chunk([7, 8, 9, 6, 5], 2, 3)], SIZE)
    assert group.blocks.tolist() == [[7, 8]]


def test_length_classes_are_within_a_factor_of_two_blocks() -> None:
    classes: dict[int, list[int]] = {}
    for tokens in range(1, 2000):
        classes.setdefault(length_class(tokens, SIZE), []).append(-(-tokens // SIZE))
    assert all(max(blocks) <= max(1, 2 * min(blocks)) for blocks in classes.values())
    assert list(classes) == sorted(classes)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=12), st.booleans())
def test_every_row_is_in_one_group_in_its_own_order(spans: list[tuple[int, int]], by_length: bool) -> None:
    chunks = [chunk(start, count, 100 * number) for number, (start, count) in enumerate(spans)]
    groups = group_rows(chunks, SIZE, by_length=by_length)
    rows = sum(count for _, count in spans)
    assert [row for group in groups for row in range(group.rows.start, group.rows.stop)] == [*range(rows)]
    assert [p for group in groups for p in group.positions.flatten().tolist()] == [
        position for start, count in spans for position in range(start, start + count)
    ]
    tables = [table for group in groups for table in group.blocks.tolist()]
    for one, table in zip(chunks, tables, strict=True):
        assert table[: len(one.table)] == list(one.table)  # what it needs, in order
        assert set(table) == set(one.table)  # and never a block of another sequence
    for group in groups:
        assert group.lengths.tolist() == (group.positions[:, -1] + 1).tolist()
        assert group.keys == max(group.lengths.tolist()) <= group.blocks.shape[1] * SIZE
