"""Every row of a layer goes to exactly one place."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.assignment import Part, assign


def test_an_expert_without_replicas_runs_inline() -> None:
    assert assign([2, 0, 3], lambda expert: (), 1, 0) == ([], [Part(0, 0, 2), Part(2, 2, 3)])


def test_one_replica_gets_all_its_experts_in_one_go() -> None:
    remote, inline = assign([2, 1], lambda expert: ("a",), 1, 0)
    assert remote == [("a", [Part(0, 0, 2), Part(1, 2, 1)])]
    assert inline == []


def test_rows_are_split_evenly_over_replicas() -> None:
    remote, _ = assign([10], lambda expert: ("a", "b", "c"), 1, 0)
    assert sorted(part.rows for _, parts in remote for part in parts) == [3, 3, 4]


def test_few_rows_stay_together_and_take_turns() -> None:
    served = [assign([10], lambda expert: ("a", "b"), 6, turn)[0] for turn in range(2)]
    assert [[replica for replica, _ in remote] for remote in served] == [["a"], ["b"]]


@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=12),
    replicas=st.lists(st.integers(0, 4), min_size=12, max_size=12),
    min_rows=st.integers(1, 20),
    turn=st.integers(0, 100),
)
def test_every_row_is_assigned_once(counts: list[int], replicas: list[int], min_rows: int, turn: int) -> None:
    remote, inline = assign(counts, lambda expert: [(expert, i) for i in range(replicas[expert])], min_rows, turn)
    assert len({replica for replica, _ in remote}) == len(remote)
    parts = [(replica[0], part) for replica, parts in remote for part in parts] + [
        (part.expert, part) for part in inline
    ]
    rows = sorted((row, expert) for expert, part in parts for row in range(part.start, part.start + part.rows))
    expected = [expert for expert, count in enumerate(counts) for _ in range(count)]
    assert rows == list(enumerate(expected))
    assert all(expert == part.expert and part.rows > 0 for expert, part in parts)
