"""What a policy means to a planning round."""

from __future__ import annotations

from typing import Any

import pytest

from placement.cost import Speed
from placement.from_policy import round_settings
from placement.policy import parse_policy


def test_sizes_are_bytes_and_absent_bounds_are_none() -> None:
    policy = parse_policy({"planner": {"memory_mib": 3, "max_moves_mib": 2}, "experts": {"memory_mib": 1}}, "p")
    settings = round_settings(policy, 8)
    assert (settings.placement.max_bytes, settings.placement.max_moved_bytes) == (3 << 20, 2 << 20)
    assert settings.replica_bytes == 1 << 20
    plain = round_settings(parse_policy({}, "p"), 8)
    assert (plain.placement.max_bytes, plain.placement.max_moved_bytes, plain.replica_bytes) == (None, None, None)


def test_never_going_to_zero_for_idleness_is_forever() -> None:
    assert round_settings(parse_policy({"planner": {"idle_to_zero_s": None}}, "p"), 8).idle_to_zero_s == float("inf")


def test_an_emulated_device_is_declared() -> None:
    device = {"kind": "emulated", "rows_per_s": 2000, "weight_read_ms": 1.5}
    settings = round_settings(parse_policy({"experts": {"device": device}}, "p"), 8, cores=2)
    assert settings.device == Speed(read_s=0.0015, row_s=0.0005)
    assert settings.max_replicas == 8


def test_overrides_are_passed_on() -> None:
    policy = parse_policy({"overrides": [{"experts": [1], "pin": True}, {"layers": [3], "max_replicas": 2}]}, "p")
    first, second = round_settings(policy, 8).overrides
    assert (first.experts, first.layers, first.pin) == ((1,), None, True)
    assert (second.experts, second.layers, second.max_replicas) == (None, (3,), 2)


@pytest.mark.parametrize(
    ("experts", "units", "cores", "most"),
    [
        ({}, 8, 2, 1),  # eight replicas share two cores already
        ({}, 2, 8, 4),
        ({"replicas": 3}, 8, 2, 3),  # the operator's word
        ({"resources": {"cpu": 1}}, 8, 2, 8),  # Ray counts them
        ({"resources": {"gpu": 0.5}}, 8, 2, 8),
    ],
)
def test_replicas_that_share_cores_are_no_more_than_these(
    experts: dict[str, Any], units: int, cores: int, most: int
) -> None:
    assert round_settings(parse_policy({"experts": experts}, "p"), units, cores).max_replicas == most


def test_a_gateway_that_computes_nothing_needs_one_of_each() -> None:
    assert round_settings(parse_policy({"gateway": {"inline": "never"}}, "p"), 4).min_replicas == 1


def test_a_gateway_that_prefers_itself_gets_no_more_replicas_on_its_cores_than_it_starts_with() -> None:
    prefer = {"gateway": {"inline": "prefer"}}
    assert round_settings(parse_policy({**prefer, "experts": {"replicas": 0}}, "p"), 2, cores=8).max_replicas == 0
    assert round_settings(parse_policy({**prefer, "experts": {"replicas": 1}}, "p"), 2, cores=8).max_replicas == 1
    assert round_settings(parse_policy(prefer, "p"), 2).max_replicas == 8
