"""Forecasts of one gateway's load are judged by what then came, and by nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from deploy.planner.follower import Follower
from predictor.load_step import LoadStep
from predictor.signals import LoadSignals
from tests.predictor.steps import SHAPE, routings


def steps(count: int, seed: int = 0) -> list[LoadStep]:
    """A step every 50 ms."""
    signals = LoadSignals(SHAPE)
    return [signals.observe(routing) for routing in routings(count, seed=seed)]


def follow(follower: Follower, some: list[LoadStep]) -> None:
    for step in some:
        follower.observe(step)


def test_before_anything_came_nothing_is_expected() -> None:
    layers = Follower(SHAPE, 1.0, None).forecast()
    assert [layer.layer for layer in layers] == list(SHAPE.layers)
    assert all(sum(layer.expected) == 0 and layer.error is None and layer.actual == [] for layer in layers)


def test_a_forecast_is_compared_with_the_rows_of_its_horizon() -> None:
    follower, all_steps = Follower(SHAPE, 1.0, None), steps(60)
    follow(follower, all_steps[:30])
    told = follower.forecast()
    follow(follower, all_steps[30:])
    until = all_steps[29].time_s + 1.0
    coming = [step for step in all_steps[30:] if step.time_s <= until]
    actual = sum((step.prefill_counts + step.decode_counts for step in coming), np.zeros((3, 6), int))
    for place, (before, after) in enumerate(zip(told, follower.forecast(), strict=True)):
        assert after.actual == actual[place].tolist()
        expected = np.array(before.expected) / sum(before.expected)
        np.testing.assert_allclose(after.forecast, expected, atol=2e-3)
        error = np.abs(np.array(after.forecast) - actual[place] / actual[place].sum()).sum() / 2
        assert after.error == pytest.approx(error, abs=1e-3)


def test_nothing_is_judged_before_its_horizon_has_passed() -> None:
    follower, all_steps = Follower(SHAPE, 1.0, None), steps(40)
    follow(follower, all_steps[:20])
    follower.forecast()
    follow(follower, all_steps[20:35])
    assert all(layer.error is None for layer in follower.forecast())


def test_while_nothing_comes_a_forecast_is_made_once() -> None:
    follower, all_steps = Follower(SHAPE, 1.0, None), steps(60)
    follow(follower, all_steps[:20])
    for _ in range(5):
        follower.forecast()
    assert len(follower._open) == 1


def test_layers_that_got_nothing_are_not_judged() -> None:
    follower, all_steps = Follower(SHAPE, 0.5, None), steps(60)
    follow(follower, all_steps[:20])
    follower.forecast()
    for step in all_steps[20:]:
        empty = dataclasses.replace(
            step, prefill_counts=step.prefill_counts.copy(), decode_counts=step.decode_counts.copy()
        )
        empty.prefill_counts[1] = 0
        empty.decode_counts[1] = 0
        follower.observe(empty)
    errors = [layer.error for layer in follower.forecast()]
    assert errors[1] is None
    assert errors[0] is not None
    assert errors[2] is not None


def test_it_says_what_it_forecasts_with_and_why() -> None:
    [layer, *_] = Follower(SHAPE, 1.0, None).forecast()
    assert layer.method == "average"
    assert "no predictor is trained yet" in layer.reason
