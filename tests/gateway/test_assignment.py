"""Every row of a layer goes to exactly one place, and over time each replica gets its share."""

from __future__ import annotations

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.assignment import Holders, Part, assign

NOBODY: Holders[str] = Holders.of([])


def test_an_expert_without_replicas_runs_inline() -> None:
    assert assign([2, 0, 3], lambda expert: NOBODY, 1, 0) == ([], [Part(0, 0, 2), Part(2, 2, 3)])


def test_one_replica_gets_all_its_experts_in_one_go() -> None:
    remote, inline = assign([2, 1], lambda expert: Holders.evenly("a"), 1, 0)
    assert remote == [("a", [Part(0, 0, 2), Part(1, 2, 1)])]
    assert inline == []


def test_rows_are_split_evenly_over_replicas() -> None:
    remote, _ = assign([10], lambda expert: Holders.evenly("abc"), 1, 0)
    assert sorted(part.rows for _, parts in remote for part in parts) == [3, 3, 4]


def test_rows_are_split_by_shares() -> None:
    remote, _ = assign([100], lambda expert: Holders.of([("a", 0.7), ("b", 0.2), ("c", 0.1)]), 10, 3)
    assert {replica: part.rows for replica, [part] in remote} == {"a": 70, "b": 20, "c": 10}


def test_few_rows_stay_together_and_take_turns() -> None:
    served = [assign([10], lambda expert: Holders.evenly("ab"), 6, turn)[0] for turn in range(2)]
    assert [[replica for replica, _ in remote] for remote in served] == [["a"], ["b"]]


def test_a_share_too_small_for_a_part_of_its_own_gets_its_turn() -> None:
    taken: collections.Counter[str] = collections.Counter()
    for turn in range(1000):
        remote, _ = assign([64], lambda expert: Holders.of([("a", 0.9), ("b", 0.1)]), 32, turn)
        assert all(part.rows >= 32 for _, parts in remote for part in parts)
        taken.update({replica: part.rows for replica, [part] in remote})
    assert taken["b"] / 64_000 == pytest.approx(0.1, abs=0.002)


def test_experts_of_the_same_replicas_do_not_all_choose_the_same_one() -> None:
    for turn in range(20):
        remote, _ = assign([1] * 16, lambda expert: Holders.evenly("ab"), 1, turn)
        assert sorted(len(parts) for _, parts in remote) in ([7, 9], [8, 8])


def test_replicas_that_are_left_keep_their_proportions() -> None:
    holders = Holders.of([("a", 0.2), ("b", 0.6), ("c", 0.2)]).only(lambda replica: replica != "a")
    assert holders.replicas == ("b", "c")
    assert holders.edges == pytest.approx((0.75, 1.0))
    assert holders.least == pytest.approx(0.25)
    assert holders.only(lambda replica: False) == NOBODY


SHARES = st.lists(st.floats(0.01, 1.0), min_size=0, max_size=5)


@given(
    counts=st.lists(st.integers(0, 200), min_size=1, max_size=12),
    shares=st.lists(SHARES, min_size=12, max_size=12),
    min_rows=st.integers(1, 20),
    turn=st.integers(0, 10_000),
)
def test_every_row_is_assigned_once(counts: list[int], shares: list[list[float]], min_rows: int, turn: int) -> None:
    held = [Holders.of([((expert, i), share) for i, share in enumerate(mine)]) for expert, mine in enumerate(shares)]
    remote, inline = assign(counts, held.__getitem__, min_rows, turn)
    assert len({replica for replica, _ in remote}) == len(remote)
    parts = [(replica[0], part) for replica, parts in remote for part in parts] + [
        (part.expert, part) for part in inline
    ]
    rows = sorted((row, expert) for expert, part in parts for row in range(part.start, part.start + part.rows))
    expected = [expert for expert, count in enumerate(counts) for _ in range(count)]
    assert rows == list(enumerate(expected))
    assert all(expert == part.expert and part.rows > 0 for expert, part in parts)
    for _, part in parts:
        assert part.rows >= min(min_rows, counts[part.expert])


@given(
    shares=st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5), count=st.integers(1, 60), min_rows=st.integers(1, 40)
)
def test_over_time_everybody_gets_its_share(shares: list[float], count: int, min_rows: int) -> None:
    held, turns = Holders.of(list(enumerate(shares))), 400
    taken: collections.Counter[int] = collections.Counter()
    for turn in range(turns):
        for replica, [part] in assign([count], lambda expert: held, min_rows, turn)[0]:
            taken[replica] += part.rows
    for replica, share in enumerate(shares):
        assert taken[replica] / (turns * count) == pytest.approx(share / sum(shares), abs=0.02)


@given(
    shares=st.lists(st.floats(0.05, 1.0), min_size=2, max_size=5), count=st.integers(1, 500), turn=st.integers(0, 99)
)
def test_with_room_for_all_nobody_is_a_row_off(shares: list[float], count: int, turn: int) -> None:
    held = Holders.of(list(enumerate(shares)))
    taken = {replica: part.rows for replica, [part] in assign([count], lambda expert: held, 1, turn)[0]}
    for replica, share in enumerate(shares):
        assert abs(taken.get(replica, 0) - count * share / sum(shares)) < 1 + 1e-6
