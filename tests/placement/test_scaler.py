"""The scaler: copies where they save the most seconds, none that do not help, none for what is not worth its memory."""

import itertools

import numpy as np
from hypothesis import given, settings

from placement.problem import Copies, Problem
from placement.scaler import replicas_wanted, scale
from placement.settings import GIB, PlacementSettings
from tests.placement.problems import MEMORY, SLICE, problem, problems

FREE = PlacementSettings(spread_above=None)


def paid(seconds: float) -> PlacementSettings:
    """Keeping one slice costs so many seconds a second."""
    return PlacementSettings(spread_above=None, gib_worth=seconds * GIB / SLICE)


@given(problems())
@settings(max_examples=200, deadline=None)
def test_copies_fit_in_the_memory_of_all_devices(given: Problem) -> None:
    for wanted in (FREE, PlacementSettings(min_copies=2), PlacementSettings(max_copies=1), paid(1e-3)):
        copies = scale(given, wanted).copies
        assert copies.sum() <= given.slots.sum()
        assert copies.max(initial=0) <= min(wanted.max_copies, given.shape[2])


@given(problems())
@settings(max_examples=200, deadline=None)
def test_more_memory_never_means_a_slower_plan(given: Problem) -> None:
    layers, experts, devices = given.shape
    seconds = []
    for slots in range(layers * experts, layers * experts * 3):
        cut = np.full(devices, slots // devices)
        cut[: slots % devices] += 1
        scaled = scale(problem(given.demand.rows, cut, cost=given.speed), FREE)
        seconds.append((scaled.work / np.clip(scaled.copies, 1, scaled.parts)).max(axis=1).sum())
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(seconds))


def test_the_hottest_slice_of_the_layer_that_gains_most_gets_the_copy() -> None:
    copies = scale(problem([[10.0, 1.0], [4.0, 3.9]], [2, 1, 1, 1]), FREE).copies
    assert copies.tolist() == [[2, 1], [1, 1]]


def test_a_layer_may_get_more_memory_than_another() -> None:
    copies = scale(problem([[100.0, 1.0, 1.0], [1.0, 1.0, 1.0]], np.full(9, 1)), FREE).copies
    assert copies[0].sum() > copies[1].sum() == 3


def test_never_more_copies_than_help() -> None:
    assert scale(problem([[20.0, 20.0]], [9, 9, 9], cost=MEMORY), FREE).copies.tolist() == [[1, 1]]
    assert scale(problem([[45.0, 20.0]], [9, 9, 9], cost=MEMORY), FREE).copies.tolist() == [[2, 1]]


def test_a_copy_must_save_what_its_memory_costs() -> None:
    rows = [[10.0, 10.0, 40.0]]
    assert scale(problem(rows, [9, 9]), paid(5e-3)).copies.tolist() == [[1, 1, 2]]
    assert scale(problem(rows, [9, 9]), paid(9.9e-3)).copies.tolist() == [[1, 1, 1]], "one more saves 10 ms at most"
    assert scale(problem(rows, [9, 9], steps_per_s=10.0), paid(9.9e-3)).copies[0, 2] == 2


def test_slices_worth_less_than_their_keeping_go_to_zero_but_not_at_once() -> None:
    rows = [[9.0, 11.0, 0.0]]
    assert scale(problem(rows, [9]), paid(10e-3)).copies.tolist() == [[0, 1, 0]]
    held = Copies.of([0, 0, 0], [0, 1, 2], [0, 0, 0])
    assert scale(problem(rows, [9], resident=held), paid(10e-3)).copies.tolist() == [[1, 1, 0]]
    assert scale(problem(rows, [9], steps_per_s=0.0), paid(10e-3)).copies.sum() == 0


def test_the_operators_least_and_most_hold() -> None:
    least = PlacementSettings(spread_above=None, min_copies=2, gib_worth=1e12)
    assert scale(problem([[0.0, 5.0]], [9, 9, 9]), least).copies.tolist() == [[2, 2]]
    most = PlacementSettings(max_copies=1)
    assert scale(problem([[100.0, 1.0]], [9, 9, 9], node=[0, 1, 2]), most).copies.tolist() == [[1, 1]]


def test_where_memory_is_short_the_most_valuable_slices_are_held() -> None:
    assert scale(problem([[1.0, 5.0, 3.0]], [2]), FREE).copies.tolist() == [[0, 1, 1]]


def test_hot_slices_get_a_copy_for_the_loss_of_a_node() -> None:
    rows = [[10.0, 1.0, 1.0]]
    spread = PlacementSettings(spread_above=1.0)
    scaled = scale(problem([[60.0, 1.0, 1.0]], [9, 9], cost=MEMORY, node=[0, 1]), spread)
    assert scaled.spread.tolist() == [[True, False, False]]
    assert scaled.copies.tolist() == [[2, 1, 1]]
    assert not scale(problem(rows, [9, 9], node=[0, 0]), spread).spread.any()


def test_a_unit_has_as_many_replicas_as_its_slice_with_most_copies() -> None:
    assert replicas_wanted(np.array([[1, 3], [2, 0]]), np.array([[0, 1], [0, 1]]), 3).tolist() == [2, 3, 0]
