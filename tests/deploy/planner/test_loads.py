"""Loads of several gateways, together."""

from __future__ import annotations

import numpy as np
import pytest

from deploy.planner.loads import Loads
from predictor.load_step import LoadStep
from predictor.signals import LoadSignals
from tests.predictor.steps import SHAPE, routings


@pytest.fixture(scope="module")
def steps() -> list[LoadStep]:
    """A step every 50 ms."""
    signals = LoadSignals(SHAPE)
    return [signals.observe(routing) for routing in routings(80)]


def followed(steps: list[LoadStep], *gateways: str) -> Loads:
    loads = Loads(SHAPE, 1.0, None, now_s=0.0)
    for gateway in gateways:
        loads.observe(gateway, steps, now_s=100.0)
    for follower in loads.followers:
        follower.forecast()
    return loads


def test_gateways_add_up(steps: list[LoadStep]) -> None:
    one, two = followed(steps, "a").expected(100.5), followed(steps, "a", "b").expected(100.5)
    assert one.rows.sum() > 0
    assert np.allclose(two.rows, 2 * one.rows)
    assert two.steps_per_s == 2 * one.steps_per_s == 160


def test_margins_of_gateways_partly_cancel(steps: list[LoadStep]) -> None:
    one, two = followed(steps, "a").expected(100.5), followed(steps, "a", "b").expected(100.5)
    assert np.allclose(two.p90 - two.rows, np.sqrt(2) * (one.p90 - one.rows))


def test_a_silent_gateway_expects_nothing(steps: list[LoadStep]) -> None:
    load = followed(steps, "a").expected(101.5)
    assert load.rows.sum() == load.p90.sum() == load.steps_per_s == 0


def test_it_is_known_for_how_long_a_slice_had_no_row(steps: list[LoadStep]) -> None:
    step = next(step for step in steps if ((step.prefill_counts + step.decode_counts) == 0).any())
    used = (step.prefill_counts + step.decode_counts) > 0
    loads = Loads(SHAPE, 1.0, None, now_s=0.0)
    loads.observe("a", [step], now_s=100.0)
    idle_s = loads.expected(105.0).idle_s
    assert (idle_s[used] == 5).all()
    assert (idle_s[~used] == 105).all()


def test_gateways_that_went_are_forgotten_once_they_are_silent(steps: list[LoadStep]) -> None:
    loads = followed(steps, "a", "b")
    loads.keep(["b"], now_s=100.5)
    assert loads.gateways == ["a", "b"]
    loads.keep(["b"], now_s=102.0)
    assert loads.gateways == ["b"]
    assert loads.steps == 80


def test_another_horizon_counts_from_the_next_forecast_on(steps: list[LoadStep]) -> None:
    loads = followed(steps, "a")
    near = loads.expected(100.5).rows.sum()
    loads.look(2.0)
    assert loads.expected(100.5).rows.sum() == 0, "what was expected was expected of another horizon"
    for follower in loads.followers:
        follower.forecast()
    assert loads.expected(100.5).rows.sum() > 1.5 * near
