"""The histogram of layer times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.layer_times import EDGES, LayerTimes, quantile


@given(st.lists(st.floats(2e-5, 10.0), min_size=1, max_size=50), st.floats(0.01, 1.0))
def test_quantiles_are_right_to_within_a_bucket(seconds: list[float], part: float) -> None:
    times = LayerTimes()
    for each in seconds:
        times.observe(each)
    found = quantile(times.counts, part)
    exact = sorted(seconds)[max(0, -int(-part * len(seconds) // 1) - 1)]
    assert found is not None
    assert exact / 1.101 <= found <= exact * 1.101


def test_extremes_are_counted() -> None:
    times = LayerTimes()
    for seconds in (0.0, 1e-6, 1e3):
        times.observe(seconds)
    assert (times.counts[0], times.counts[-1]) == (2, 1)
    assert times.seconds == pytest.approx(1000.000001)


def test_of_no_calls_nothing_is_said() -> None:
    assert quantile(LayerTimes().counts, 0.5) is None
    assert list(EDGES) == sorted(EDGES)
