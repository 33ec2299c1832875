"""Sharing a step's rows among copies, so that all replicas end together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hypothesis import given
from hypothesis import strategies as st

from gateway.assignment import Holders, Part
from gateway.levelling import Pace, assign_levelled, level

EVEN = Pace(0.0, 1.0)


def ends(rows: list[int], holders: list[list[int]], paces: list[Pace], found: list[list[int]]) -> list[float]:
    """When each replica is done."""
    busy = [0.0] * len(paces)
    for mine, counts in zip(holders, found, strict=True):
        for place, count in zip(mine, counts, strict=True):
            busy[place] += max(paces[place].read_s, paces[place].row_s * count) if count else 0.0
    return busy


@st.composite
def layers(draw: st.DrawFn, most: int = 12) -> tuple[list[int], list[list[int]], list[Pace]]:
    """Rows of experts, who holds them, and how fast those are."""
    paces = draw(st.lists(st.builds(Pace, st.floats(0, 5), st.sampled_from([0.5, 1.0, 3.0])), min_size=1, max_size=6))
    places = st.lists(st.integers(0, len(paces) - 1), min_size=1, unique=True)
    experts = draw(st.lists(st.tuples(st.integers(1, 60), places), max_size=most))
    return [rows for rows, _ in experts], [holders for _, holders in experts], paces


@given(layers())
def test_every_row_is_computed_once(layer: tuple[list[int], list[list[int]], list[Pace]]) -> None:
    rows, holders, paces = layer
    found = level(rows, holders, paces)
    assert [sum(counts) for counts in found] == rows
    assert all(count >= 0 for counts in found for count in counts)
    assert [len(counts) for counts in found] == [len(mine) for mine in holders]


@given(layers())
def test_it_is_no_slower_than_sharing_evenly_or_not_at_all(
    layer: tuple[list[int], list[list[int]], list[Pace]],
) -> None:
    rows, holders, paces = layer
    ours = max(ends(rows, holders, paces, level(rows, holders, paces)), default=0)
    alone = [[count] + [0] * (len(mine) - 1) for count, mine in zip(rows, holders, strict=True)]
    even = [
        [count // len(mine) + (place < count % len(mine)) for place in range(len(mine))]
        for count, mine in zip(rows, holders, strict=True)
    ]
    slack = 2 * max(pace.row_s for pace in paces) + 0.35 * ours  # whole rows; sweeps come near, not always to the best
    for other in (alone, even):
        assert ours <= max(ends(rows, holders, paces, other), default=0) + slack


@given(layers(most=2))
def test_small_layers_end_nearly_as_soon_as_possible(layer: tuple[list[int], list[list[int]], list[Pace]]) -> None:
    rows, holders, paces = layer
    rows = [min(count, 9) for count in rows]
    ours = max(ends(rows, holders, paces, level(rows, holders, paces)), default=0)
    ways = [list(_splits(count, len(mine))) for count, mine in zip(rows, holders, strict=True)]
    best = min((max(ends(rows, holders, paces, list(way)), default=0) for way in itertools.product(*ways)), default=0)
    assert ours <= 1.5 * best + 2 * max(pace.row_s for pace in paces)


def _splits(count: int, parts: int) -> Iterator[list[int]]:
    if parts > 3:
        return iter([[count] + [0] * (parts - 1)])
    return (list(way) for way in itertools.product(range(count + 1), repeat=parts) if sum(way) == count)


def test_a_hot_expert_goes_where_others_leave_room() -> None:
    assert level([30, 10], [[0, 1], [1]], [EVEN, EVEN]) == [[20, 10], [10]]


def test_faster_replicas_get_more() -> None:
    assert level([30], [[0, 1]], [Pace(0, 1.0), Pace(0, 2.0)]) == [[20, 10]]


def test_a_few_rows_are_not_worth_reading_the_weights_twice() -> None:
    assert level([4], [[0, 1]], [Pace(5, 1), Pace(5, 1)]) == [[4, 0]]
    assert level([20], [[0, 1]], [Pace(5, 1), Pace(5, 1)]) == [[10, 10]]


def test_chains_of_copies_carry_load_away() -> None:
    found = level([30, 6, 6], [[0, 1], [1, 2], [2, 3]], [EVEN] * 4)
    assert max(ends([30, 6, 6], [[0, 1], [1, 2], [2, 3]], [EVEN] * 4, found)) <= 16


@given(layers(), st.integers(0, 5))
def test_assigned_parts_cover_each_row_once(layer: tuple[list[int], list[list[int]], list[Pace]], turn: int) -> None:
    rows, holders, paces = layer
    counts = [*rows, 0, 7]  # an expert without rows, and one that nobody holds
    held = [Holders.evenly(mine) for mine in holders] + [Holders.evenly([0]), Holders.of([])]
    remote, inline = assign_levelled(counts, held.__getitem__, paces.__getitem__, turn)
    assert inline == [Part(len(rows) + 1, sum(rows), 7)]
    seen = sorted(
        (row, part.expert)
        for _, parts in [*remote, (None, inline)]
        for part in parts
        for row in range(part.start, part.start + part.rows)
    )
    assert seen == [(row, expert) for row, expert in enumerate(e for e, n in enumerate(counts) for _ in range(n))]
    assert all(replica in held[part.expert].replicas for replica, parts in remote for part in parts)


def test_replicas_alike_take_turns() -> None:
    holders = Holders.evenly(["a", "b"])
    first = [assign_levelled([1], lambda _: holders, lambda _: EVEN, turn)[0][0][0] for turn in range(4)]
    assert first in (["a", "b", "a", "b"], ["b", "a", "b", "a"])
