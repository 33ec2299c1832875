"""How few and how many copies: `experts` of the policy, other bounds for single slices."""

from __future__ import annotations

from typing import Any

from placement.policy import Policy
from placement.policy.bounds import Bounds, slice_bounds, unit_bounds
from placement.unit import Unit

UNIT = Unit("expert-1", (1,), (0, 2, 4))


def policy(*overrides: dict[str, Any], inline: str = "fallback") -> Policy:
    experts = {"min_replicas": 1, "max_replicas": 4}
    return Policy.model_validate({"experts": experts, "overrides": overrides, "gateway": {"inline": inline}})


def test_without_overrides_every_slice_is_alike() -> None:
    assert slice_bounds(policy(), 0, 1) == unit_bounds(policy(), UNIT) == Bounds(1, 4)


def test_an_override_counts_for_what_it_names() -> None:
    bounded = policy({"experts": [1], "layers": [2], "min_replicas": 2, "max_replicas": 6})
    assert slice_bounds(bounded, 2, 1) == Bounds(2, 6)
    assert slice_bounds(bounded, 0, 1) == slice_bounds(bounded, 2, 0) == Bounds(1, 4)
    assert unit_bounds(bounded, UNIT) == Bounds(2, 6)


def test_later_overrides_win_key_by_key() -> None:
    bounded = policy({"min_replicas": 0, "max_replicas": 2}, {"experts": [1], "max_replicas": 3})
    assert slice_bounds(bounded, 0, 1) == Bounds(0, 3)
    assert slice_bounds(bounded, 0, 0) == Bounds(0, 2)


def test_a_pinned_slice_keeps_a_copy() -> None:
    assert slice_bounds(policy({"min_replicas": 0}, {"layers": [0], "pin": True}), 0, 1) == Bounds(1, 4)


def test_a_unit_may_be_kept_inline() -> None:
    assert unit_bounds(policy({"experts": [1], "min_replicas": 0, "max_replicas": 0}), UNIT) == Bounds(0, 0)


def test_a_gateway_that_never_computes_experts_needs_one_replica_of_each() -> None:
    assert unit_bounds(policy({"min_replicas": 0, "max_replicas": 0}, inline="never"), UNIT) == Bounds(1, 1)


def test_counts_are_brought_within_bounds() -> None:
    assert [Bounds(1, 3).clamp(count) for count in (0, 2, 9)] == [1, 2, 3]
