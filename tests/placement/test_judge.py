"""The judge: the slowest device makes the layer, weights are read by every device that gets rows."""

import numpy as np
import pytest

from placement.judge import judge
from placement.problem import Assignment, Copies
from tests.placement.problems import MEMORY, SLICE, problem


def test_a_layer_takes_as_long_as_its_slowest_device_and_the_call() -> None:
    given = problem([[30.0, 10.0]], [2, 2], call_s=[0.0, 5e-3])
    copies = Copies.of([0, 0, 0], [0, 0, 1], [0, 1, 1], [0.5, 0.5, 1.0])
    verdict = judge(given, Assignment.of(given, copies))
    assert verdict.layer_s == pytest.approx([30e-3])
    np.testing.assert_allclose(verdict.device_s, [[15e-3, 30e-3]])
    assert verdict.bound_s == pytest.approx([22.5e-3])
    assert verdict.resident_bytes == 3 * SLICE


def test_splitting_few_rows_reads_weights_twice() -> None:
    given = problem([[20.0]], [1, 1], cost=MEMORY)
    split = judge(given, Assignment.of(given, Copies.of([0, 0], [0, 0], [0, 1], [0.5, 0.5])))
    assert split.device_s.sum() == pytest.approx(40e-3)


def test_what_no_device_holds_takes_the_gateways_time() -> None:
    given = problem([[3.0, 4.0, 0.0]], [1])
    verdict = judge(given, Assignment.of(given, Copies.of([0], [0], [0], [1.0])))
    assert verdict.layer_s == pytest.approx([4e-3])
    assert verdict.inline == 1
