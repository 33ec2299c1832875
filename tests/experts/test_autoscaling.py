"""Serve's autoscaling policy does what the plan says, and never waits for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from experts.autoscaling import PlannedReplicas
from placement import plan
from placement.plan import Plan
from placement.policy import Policy
from placement.policy.fitting import ModelFacts
from recovery import plans
from recovery.directory import Directory
from recovery.plans import PlanReader
from recovery.policies import PolicyReader, start_policy
from recovery.redis_server import RedisServer
from tests.waiting import eventually

MODEL = ModelFacts(name="m", experts=2, layers=(0, 1), slice_bytes=1 << 20)
CONTEXT = SimpleNamespace(target_num_replicas=3)


def publish(directory: Directory, epoch: int, **replicas: int) -> None:
    directory.publish(plan.DOCUMENT, plan.encode(Plan(epoch=epoch, replicas=replicas, reason="test")))


def wanted(policy: PlannedReplicas) -> int:
    return policy(CONTEXT)[0]


@pytest.fixture
def readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[RedisServer, Directory]]:
    """A directory, and this process's readers of it, which end with the test."""
    with RedisServer(tmp_path / "redis") as server, contextlib.ExitStack() as opened:
        directory = Directory(server.url, "test")
        plans_read = opened.enter_context(contextlib.closing(PlanReader(directory)))
        policies_read = opened.enter_context(PolicyReader(directory))
        monkeypatch.setattr("experts.autoscaling.plan_reader", lambda url, namespace: plans_read)
        monkeypatch.setattr("experts.autoscaling.policy_reader", lambda url, namespace: policies_read)
        yield server, directory


def test_it_follows_the_plan_and_holds_the_last_one_without_redis(readers: tuple[RedisServer, Directory]) -> None:
    server, directory = readers
    policy = PlannedReplicas(server.url, "test", "e", [0], [0, 1])
    assert wanted(policy) == 3, "without a plan there is nothing to change"
    publish(directory, 1, e=5)
    eventually(lambda: wanted(policy) == 5)
    publish(directory, 2, other=1)
    eventually(lambda: wanted(policy) == 3, what="a unit that is not named keeps what it has")
    publish(directory, 3, e=0)
    eventually(lambda: wanted(policy) == 0)
    directory.publish(plan.DOCUMENT, b"{oops")
    publish(directory, 4, e=2)
    eventually(lambda: wanted(policy) == 2)
    server.__exit__()
    assert wanted(policy) == 2


def test_it_keeps_within_the_bounds_that_an_operator_applies(readers: tuple[RedisServer, Directory]) -> None:
    server, directory = readers
    first = PlannedReplicas(server.url, "test", "expert-0", [0], [0, 1])
    second = PlannedReplicas(server.url, "test", "expert-1", [1], [0, 1])
    directory.publish(plan.DOCUMENT, plan.encode(Plan(epoch=1, replicas={"expert-0": 5, "expert-1": 0}, reason="test")))
    eventually(lambda: (wanted(first), wanted(second)) == (5, 0), what="the plan is read")
    bounded = Policy.model_validate(
        {"experts": {"max_replicas": 2}, "overrides": [{"experts": [1], "layers": [0], "min_replicas": 1}]}
    )
    start_policy(directory, bounded, MODEL, keep=True)
    eventually(lambda: (wanted(first), wanted(second)) == (2, 1), what="the policy is read")
    start_policy(directory, Policy(), MODEL, keep=False)
    eventually(lambda: (wanted(first), wanted(second)) == (5, 0), what="another policy is read")


def test_one_process_has_one_reader_for_an_application() -> None:
    with RedisServer() as server:
        first = plans.plan_reader(server.url, "a")
        assert plans.plan_reader(server.url, "a") is first
        first.close()
    plans.plan_reader.cache_clear()
