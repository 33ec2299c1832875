"""Counts of replicas: up at once where it is worth it, down with patience, always within the operator's bounds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from placement.arrays import Ints
from placement.counts import Counts


def follow(subject: Counts, now_s: float, wanted: int, **given: int | bool) -> int:
    """One unit; between 0 and 9 unless told otherwise."""
    after: Ints = subject.follow(
        now_s,
        np.array([wanted]),
        least=np.array([given.get("least", 0)]),
        most=np.array([given.get("most", 9)]),
        worth=np.array([given.get("worth", True)]),
        idle=np.array([given.get("idle", False)]),
        cool_down_s=10.0,
    )
    return int(after[0])


def test_up_at_once_if_it_is_worth_it() -> None:
    subject = Counts(np.array([1]))
    assert follow(subject, 0, 4, worth=False) == 1
    assert follow(subject, 1, 4) == 4


def test_down_to_what_was_wanted_at_most_during_the_cool_down() -> None:
    subject = Counts(np.array([4]))
    wanted = [4, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    found = [follow(subject, now, each) for now, each in enumerate(wanted)]
    assert found == [4] * 11 + [2] * 4


def test_one_step_down_in_a_cool_down() -> None:
    subject = Counts(np.array([4]))
    found = [follow(subject, now, 2 if now < 5 else 1) for now in range(25)]
    assert found[9:12] == [4, 2, 2]
    assert found[19:21] == [2, 1]


def test_an_idle_unit_goes_at_once_to_its_least() -> None:
    subject = Counts(np.array([4]))
    follow(subject, 0, 4)
    assert follow(subject, 1, 1, least=1, idle=True) == 1


def test_a_changed_bound_counts_at_once() -> None:
    subject = Counts(np.array([4]))
    assert follow(subject, 0, 4, most=2) == 2
    assert follow(subject, 1, 0, least=3) == 3


@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.booleans()), max_size=40),
    st.integers(0, 3),
    st.integers(3, 6),
)
def test_always_within_bounds_and_never_more_than_was_wanted_lately(
    rounds: list[tuple[int, bool, bool]], least: int, most: int
) -> None:
    subject, last = Counts(np.array([least])), least
    for now, (wanted, worth, idle) in enumerate(rounds):
        count = follow(subject, now, wanted, least=least, most=most, worth=worth, idle=idle)
        assert least <= count <= most
        assert count <= last or (worth and count == min(max(wanted, least), most))
        last = count
