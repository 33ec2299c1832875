"""The cost model: reading weights dominates few rows, computing dominates many; both are learned."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.cost import CallFit, Speed, SpeedFit

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


def test_a_machine_reads_a_bigger_slice_for_longer() -> None:
    small, big = Speed.of(1 << 20, 1 << 19), Speed.of(1 << 22, 1 << 21)
    assert big.read_s == pytest.approx(4 * small.read_s)
    assert big.row_s == pytest.approx(4 * small.row_s)


def learned(true: Speed, prior: Speed, sizes: list[int], calls: int = 2000) -> Speed:
    """What is learned from calls of a noisy machine: one in ten is interrupted for long."""
    draw, fit = random.Random(0), SpeedFit(prior)
    for _ in range(calls):
        rows = [draw.choice(sizes) for _ in range(draw.randint(1, 4))]
        fit.observe(rows, true.seconds(rows) * draw.uniform(0.95, 1.1) * (10 if draw.random() < 0.1 else 1))
        speed = fit.speed
    assert speed is not None
    return speed


@pytest.mark.parametrize("true", [Speed(1.5e-3, 5e-4), Speed(1e-4, 1e-5), Speed(1e-2, 1e-4)])
def test_both_speeds_are_learned_from_noisy_calls(true: Speed) -> None:
    speed = learned(true, SPEED, [1, 2, 5, 40, 200])
    assert speed.read_s == pytest.approx(true.read_s, rel=0.15)
    assert speed.row_s == pytest.approx(true.row_s, rel=0.3)


def test_where_no_call_was_large_a_row_is_not_thought_dearer_than_what_was_seen() -> None:
    speed = learned(Speed(1e-3, 1e-7), Speed(1e-3, 1e-3), [1, 2, 8])
    assert speed.seconds([8]) == pytest.approx(1e-3, rel=0.15)


def test_where_no_call_was_large_the_expected_knee_stays() -> None:
    speed = learned(Speed(2e-3, 1e-7), Speed(1e-3, 1e-5), [1, 2, 8])
    assert speed.read_s / speed.row_s == pytest.approx(100, rel=0.2)


def test_a_machine_that_became_slower_is_found_out_and_prefills_are_remembered() -> None:
    fit = SpeedFit(SPEED)
    for number in range(4000):
        rows = [200] if number < 1000 and number % 20 == 0 else [2]
        fit.observe(rows, Speed(1e-3, 1e-4).seconds(rows) * (1 if number < 2000 else 3))
    assert fit.speed is not None
    assert fit.speed.seconds([2]) == pytest.approx(3e-3, rel=0.05)
    assert fit.speed.seconds([200]) > 5 * fit.speed.seconds([2])


def test_nothing_is_said_before_there_were_a_few_calls() -> None:
    fit = SpeedFit(SPEED)
    fit.observe([1], 1.0)
    assert fit.speed is None


def test_calls_are_learned_beyond_their_computing_and_slowly_forgotten() -> None:
    call = CallFit(5e-4)
    for took in [3e-3] * 100 + [9.0] * 10:
        call.observe(1e-3, took)
    assert call.seconds == pytest.approx(2e-3)
    for _ in range(20_000):
        call.forget()
    assert call.seconds == pytest.approx(5e-4)
