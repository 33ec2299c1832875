"""The cost model: reading weights dominates few rows, computing dominates many; measurements correct the scale."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.cost import Pace, Speed

SPEED = Speed(read_s=1e-3, row_s=1e-4)


def test_few_rows_cost_what_reading_their_expert_costs() -> None:
    assert SPEED.seconds([1]) == SPEED.seconds([10]) == 1e-3
    assert SPEED.seconds([1, 1, 1]) == pytest.approx(3e-3)


def test_many_rows_cost_what_computing_them_costs() -> None:
    assert SPEED.seconds([50]) == pytest.approx(5e-3)


@given(st.lists(st.integers(1, 100), min_size=1), st.integers(0, 100))
def test_more_rows_never_cost_less(rows: list[int], more: int) -> None:
    assert SPEED.seconds([*rows[:-1], rows[-1] + more]) >= SPEED.seconds(rows)


def test_splitting_an_experts_few_rows_reads_its_weights_twice() -> None:
    assert SPEED.seconds([2, 2]) == 2 * SPEED.seconds([4])


def test_a_pace_learns_how_far_reality_is_from_the_model_and_slowly_forgets() -> None:
    pace = Pace()
    assert pace.factor == 1
    for _ in range(100):
        pace.observe(expected_s=1e-3, took_s=3e-3)
    assert pace.factor == pytest.approx(3, rel=0.01)
    learned = pace.factor
    pace.forget()
    assert 1 < pace.factor < learned


def test_a_machine_reads_a_bigger_slice_for_longer() -> None:
    small, big = Speed.of(1 << 20, 1 << 19), Speed.of(1 << 22, 1 << 21)
    assert big.read_s == pytest.approx(4 * small.read_s)
    assert big.row_s == pytest.approx(4 * small.row_s)
