"""Water-filling: what is poured stands equally high wherever it reaches, and nowhere where that is lower."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from placement.arrays import Floats
from placement.filling import fill, lower_bound


def vessels(least: float, most: float) -> st.SearchStrategy[Floats]:
    return arrays.arrays(np.float64, 5, elements=st.floats(least, most))


@given(st.floats(0.01, 100), vessels(0, 10), vessels(0.1, 4))
def test_one_level_everywhere_it_reaches(work: float, base: Floats, speed: Floats) -> None:
    poured = fill(np.array([work]), np.zeros(5, dtype=np.int64), base, speed)
    np.testing.assert_allclose(poured.sum(), work, rtol=1e-9)
    level = base + poured / speed
    wet = poured > 1e-9
    np.testing.assert_allclose(level[wet], level[wet].max(), rtol=1e-6)
    assert (base[~wet] >= level[wet].max() * (1 - 1e-6)).all()
    np.testing.assert_allclose(lower_bound(np.array([work]), base, speed), level[wet].max(), rtol=1e-6)


def test_groups_are_filled_each_for_itself() -> None:
    poured = fill(np.array([4.0, 1.0]), np.array([0, 1, 0]), np.array([1.0, 7.0, 0.0]), np.ones(3))
    assert poured.tolist() == [1.5, 1.0, 2.5]


def test_without_work_nothing_is_needed() -> None:
    assert lower_bound(np.zeros(2), np.ones(3), np.ones(3)).tolist() == [0, 0]
