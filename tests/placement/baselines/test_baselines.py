"""The methods to compare with do what their papers say, and keep what every plan must keep."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from placement.baselines.eplb import eplb_global, eplb_hierarchical, pack, replicate
from placement.baselines.moeless import SPREAD, moeless
from placement.baselines.oracle import oracle
from placement.baselines.static import static
from placement.judge import judge
from placement.placer import plan
from placement.problem import Assignment, Demand, Problem, ProblemError, copy_counts
from placement.settings import PlacementSettings
from tests.placement.problems import problem

ROWS = np.exp(np.random.default_rng(0).normal(0, 1, (3, 16)))
METHODS = [static, eplb_global, lambda given: eplb_hierarchical(given, 4), moeless]


def given() -> Problem:
    return problem(ROWS, np.full(8, 3 * 3), node=[0, 0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("method", METHODS)
def test_all_rows_are_served_within_memory(method: Callable[[Problem], Assignment]) -> None:
    copies = method(given()).copies
    assert (copy_counts(copies, 3, 16) > 0).all()
    sums = np.bincount(copies.layer * 16 + copies.expert, weights=copies.share)
    np.testing.assert_allclose(sums, 1)
    assert (np.bincount(copies.device, minlength=8) <= 9).all()


def test_static_looks_at_no_load() -> None:
    other = dataclasses.replace(given(), demand=Demand.of(ROWS[::-1].copy()))
    assert np.array_equal(static(given()).copies.device, static(other).copies.device)
    assert static(dataclasses.replace(other, resident=static(given()).copies)).moved_bytes == 0


def test_eplb_gives_spare_slots_to_the_highest_load_per_replica() -> None:
    assert replicate(np.array([[90.0, 40.0, 10.0, 20.0]]), 7).tolist() == [[3, 2, 1, 1]]


def test_eplb_packs_by_falling_weight_with_places_alike() -> None:
    assert pack(np.array([[8.0, 1.0, 7.0, 2.0]]), 2, 2).tolist() == [[0, 0, 1, 1]]
    assert np.bincount(pack(ROWS, 4, 4)[0]).tolist() == [4, 4, 4, 4]


def test_hierarchical_eplb_keeps_groups_on_one_node() -> None:
    copies = eplb_hierarchical(given(), 4).copies
    for layer in range(3):
        for group in range(4):
            here = (copies.layer == layer) & (copies.expert // 4 == group)
            assert len(set((copies.device[here] // 4).tolist())) == 1
    assert (
        judge(given(), eplb_global(given())).layer_s.sum()
        <= judge(given(), eplb_hierarchical(given(), 4)).layer_s.sum()
    )


def test_hierarchical_eplb_is_global_where_groups_do_not_divide() -> None:
    one, other = eplb_hierarchical(given(), 1), eplb_global(given())
    assert np.array_equal(given().keys(one.copies), given().keys(other.copies))


def test_moeless_adds_replicas_until_loads_are_alike_and_reuses_warm_devices() -> None:
    wide = problem(ROWS, np.full(8, 3 * 16))
    first = moeless(wide)
    each = ROWS / copy_counts(first.copies, 3, 16)
    counts = copy_counts(first.copies, 3, 16)
    mean = ROWS.sum(axis=1) / counts.sum(axis=1)
    spread = np.sqrt((counts * (each - mean[:, None]) ** 2).sum(axis=1) / counts.sum(axis=1)) / mean
    assert (spread <= SPREAD).all()
    assert moeless(dataclasses.replace(wide, resident=first.copies)).moved_bytes == 0


def test_where_there_is_too_little_memory_they_say_so() -> None:
    short = problem(ROWS, np.full(8, 3))
    for method in METHODS:
        with pytest.raises(ProblemError, match=r"needs? "):
            method(short)


def test_the_oracle_plans_for_what_comes() -> None:
    after = Demand.of(ROWS[:, ::-1].copy())
    free = PlacementSettings(spread_above=None)
    then = dataclasses.replace(given(), demand=after)
    known, guessed = oracle(given(), after, free), plan(given(), free)
    assert judge(then, known).layer_s.sum() < 0.8 * judge(then, guessed).layer_s.sum()


def test_static_deals_the_experts_of_a_unit_to_its_devices() -> None:
    rows = np.ones((1, 4))
    for devices, expected in ((2, [0, 1, 0, 1]), (4, [0, 1, 2, 3])):
        copies = static(problem(rows, [4] * devices)).copies
        assert copies.device.tolist() == expected
    copies = static(problem(rows, [4] * 8)).copies
    assert [copies.device[copies.expert == expert].tolist() for expert in range(4)] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert copies.share.tolist() == [0.5] * 8


def test_static_keeps_to_units() -> None:
    unit = np.array([[0, 0, 1, 1]])
    found = static(problem(np.ones((1, 4)), [4] * 3, device_unit=[0, 1, 1], unit=unit)).copies
    assert list(zip(found.expert.tolist(), found.device.tolist(), strict=True)) == [(0, 0), (1, 0), (2, 1), (3, 2)]
