"""Units cut the model's slices into deployments: each slice is in exactly one."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from placement.policy import UnitPolicy
from placement.unit import make_units


def test_the_default_is_one_deployment_for_each_expert() -> None:
    units = make_units(UnitPolicy(), 3, (1, 2, 5))
    assert [unit.name for unit in units] == ["expert-0", "expert-1", "expert-2"]
    assert all(unit.layers == (1, 2, 5) for unit in units)


def test_the_finest_grain_is_one_deployment_for_each_slice() -> None:
    units = make_units(UnitPolicy(experts=1, layers=1), 2, (0, 1))
    assert [unit.name for unit in units] == [
        "expert-0.layer-0",
        "expert-0.layer-1",
        "expert-1.layer-0",
        "expert-1.layer-1",
    ]


def test_several_experts_share_a_deployment() -> None:
    units = make_units(UnitPolicy(experts=2), 5, (0,))
    assert [(unit.name, unit.experts) for unit in units] == [
        ("expert-0-1", (0, 1)),
        ("expert-2-3", (2, 3)),
        ("expert-4", (4,)),
    ]


@given(
    st.integers(1, 20),
    st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_every_slice_is_in_exactly_one_unit(experts: int, layers: list[int], per: int, grain: int) -> None:
    layers.sort()
    units = make_units(UnitPolicy(experts=per, layers=grain), experts, layers)
    slices = Counter((layer, expert) for unit in units for layer in unit.layers for expert in unit.experts)
    assert slices == Counter((layer, expert) for layer in layers for expert in range(experts))
    assert len({unit.name for unit in units}) == len(units)
