"""A policy in words: what it means, what of it changed, and the whole of it as YAML."""

from __future__ import annotations

import yaml

from placement.policy import Policy, parse_policy
from placement.policy.changes import changes
from placement.policy.fitting import ModelFacts
from placement.policy.meaning import meaning
from placement.policy.writing import text, to_yaml

MODEL = ModelFacts(name="tiny", experts=8, layers=(0, 1, 2, 3), slice_bytes=1 << 20)
SMALL = ModelFacts(name="small", experts=4, layers=(0, 1), slice_bytes=1 << 20)
CHANGED = Policy.model_validate(
    {
        "experts": {"unit": {"experts": 4}, "replicas": 2, "memory_mib": 8, "resources": {"gpu": 0.5}},
        "planner": {"memory_mib": 48, "idle_to_zero_s": None, "warm_pool": 2},
        "overrides": [{"experts": [0], "min_replicas": 1}],
        "api": {"keys": [{"name": "a", "env": "A_KEY"}]},
    }
)


def test_it_says_units_slices_and_memory() -> None:
    said = meaning(CHANGED, MODEL)
    assert said[:3] == [
        "tiny: 4 MoE layers x 8 experts are 32 slices of 1 MiB in 2 units of up to 16 slices",
        "replicas of a unit: 2 to start with, then at least 0-1 and at most 8",
        "memory: a replica holds up to 8 MiB of weights of its 16 MiB; all together 32 MiB to start with, "
        "48 MiB at most (planner.memory_mib)",
    ]
    assert "a replica computes with 1 thread and reserves 0.5 GPUs" in said
    assert "warm pool: 2 workers, about 400 MiB" in said
    assert any(line.startswith("down: idle units stay") for line in said)


def test_it_says_what_bounds_memory() -> None:
    assert "8 MiB to start with, 8 MiB at most (experts.replicas; planner" in meaning(Policy(), SMALL)[2]
    unplanned = Policy.model_validate({"planner": {"enabled": False}})
    assert meaning(unplanned, SMALL)[2].endswith("8 MiB to start with, 64 MiB at most")


def test_without_a_model_it_says_the_rest() -> None:
    assert meaning(CHANGED, None) == meaning(CHANGED, MODEL)[3:]


def test_emulated_devices_are_named_as_such() -> None:
    device = {"kind": "emulated", "rows_per_s": 2000, "weight_read_ms": 1.5}
    said = meaning(Policy.model_validate({"experts": {"device": device}}), None)
    assert said[0] == "devices: EMULATED, 2000 rows/s, 1.5 ms to read a slice, 0 ms a call"


def test_without_a_forecast_nothing_is_planned() -> None:
    said = meaning(Policy.model_validate({"predictor": {"enabled": False}}), None)
    assert "planning: none (predictor.enabled is false): experts.replicas stays" in said


def test_changes_are_named_by_key_and_told_apart_by_what_they_need() -> None:
    found = {change.key: (text(change.old), text(change.new), change.live) for change in changes(Policy(), CHANGED)}
    assert found == {
        "experts.unit.experts": ("1", "4", False),
        "experts.replicas": ("1", "2", True),
        "experts.memory_mib": ("null", "8", False),
        "experts.resources.gpu": ("0", "0.5", False),
        "planner.memory_mib": ("null", "48", True),
        "planner.idle_to_zero_s": ("300", "null", True),
        "planner.warm_pool": ("0", "2", True),
        "overrides": ("[]", "[{experts: [0], min_replicas: 1}]", True),
        "api.keys": ("[]", "[{name: a, env: A_KEY}]", False),
    }
    assert changes(CHANGED, CHANGED) == []


def test_as_yaml_it_is_the_same_policy_and_marks_what_is_not_the_default() -> None:
    for policy in (Policy(), CHANGED):
        assert parse_policy(yaml.safe_load(to_yaml(policy)), "x") == policy
    assert "#" not in to_yaml(Policy())
    marked = [line.split("#") for line in to_yaml(CHANGED).splitlines() if "#" in line]
    assert [(line.strip(), mark) for line, mark in marked][:2] == [
        ("experts: 4", " default: 1"),
        ("replicas: 2", " default: 1"),
    ]
    assert len(marked) == len(changes(Policy(), CHANGED))
