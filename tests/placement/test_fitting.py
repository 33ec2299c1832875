"""A policy against a model and a cluster: what can't be is said, all of it, with the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from placement.policy import Policy, PolicyError
from placement.policy.fitting import ModelFacts, NodeFacts, check_fit

MODEL = ModelFacts(name="tiny", experts=8, layers=(1, 2, 3), slice_bytes=2 << 20)
NODES = [
    NodeFacts(name="a", cpu=8, memory_bytes=16 << 30),
    NodeFacts(name="b", cpu=2, gpu=1, custom={"fpga": 1}, memory_bytes=4 << 30),
]


def refusals(document: dict[str, Any]) -> list[str]:
    try:
        check_fit(Policy.model_validate(document), "p.yaml", model=MODEL, nodes=NODES)
    except PolicyError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"experts": {"unit": {"experts": 9}}}, "experts.unit.experts: 9 is more than tiny has (8): lower it"),
        ({"experts": {"unit": {"layers": 4}}}, "experts.unit.layers: 4 is more than tiny has MoE layers (3)"),
        ({"overrides": [{"experts": [7, 8], "pin": True}]}, "overrides.0.experts: tiny has no expert 8: it has 0-7"),
        (
            {"overrides": [{"layers": [0, 9], "pin": True}]},
            "overrides.0.layers: tiny has no MoE layer 0, 9: it has 1-3",
        ),
        ({"experts": {"memory_mib": 1.9}}, "experts.memory_mib: 1.9 MiB hold no slice of tiny (2 MiB): raise it"),
        ({"planner": {"memory_mib": 1}}, "planner.memory_mib: 1 MiB hold no slice of tiny"),
        (
            {"planner": {"memory_mib": 47}, "experts": {"min_replicas": 1}},
            "planner.memory_mib: 47 MiB are less than the copies that every slice keeps by min_replicas take "
            "(24 of 2 MiB, 48 MiB): raise it, or lower min_replicas",
        ),
        ({"planner": {"memory_mib": 5}, "overrides": [{"layers": [2], "pin": True}]}, "planner.memory_mib: 5 MiB"),
        ({"experts": {"resources": {"cpu": 9}}}, "experts.resources.cpu: 9 for a replica, and no node has more than 8"),
        ({"experts": {"resources": {"gpu": 2}}}, "experts.resources.gpu: 2 for a replica, and no node has more than 1"),
        ({"experts": {"resources": {"custom": {"tpu": 1}}}}, "experts.resources.custom.tpu: 1 for a replica, and no"),
        ({"experts": {"resources": {"cpu": 4, "gpu": 1}}}, "experts.resources: no node has all of it together"),
        ({"planner": {"warm_pool": 20}}, "planner.warm_pool: 20 workers take about 4000 MiB, over half"),
    ],
)
def test_what_can_not_be_is_refused(document: dict[str, Any], expected: str) -> None:
    (line,) = refusals(document)
    assert line.startswith(f"p.yaml: {expected}")


def test_all_of_it_is_named() -> None:
    document = {"experts": {"unit": {"experts": 9}, "resources": {"cpu": 9}}, "planner": {"memory_mib": 1}}
    assert len(refusals(document)) == 3


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"experts": {"unit": {"experts": 8, "layers": 3}, "memory_mib": 2, "resources": {"cpu": 8}}},
        {"experts": {"resources": {"cpu": 2, "gpu": 0.5, "custom": {"fpga": 1}}}, "gateway": {"device": "cuda"}},
        {"planner": {"memory_mib": 48, "warm_pool": 10}, "experts": {"min_replicas": 1}},
    ],
)
def test_what_can_be_is_not(document: dict[str, Any]) -> None:
    assert refusals(document) == []


def test_a_gateway_on_cuda_needs_a_gpu() -> None:
    policy = Policy.model_validate({"gateway": {"device": "cuda:0"}})
    with pytest.raises(PolicyError, match="cuda:0, and no node has a GPU"):
        check_fit(policy, "p.yaml", nodes=NODES[:1])
