"""Serve's autoscaling policy does what the plan says, and never waits for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from experts.autoscaling import PlannedReplicas
from placement import plan
from placement.plan import Plan
from recovery import plans
from recovery.directory import Directory
from recovery.plans import PlanReader
from recovery.redis_server import RedisServer
from tests.waiting import eventually

CONTEXT = SimpleNamespace(target_num_replicas=3)


def publish(directory: Directory, epoch: int, **replicas: int) -> None:
    directory.publish(plan.DOCUMENT, plan.encode(Plan(epoch=epoch, replicas=replicas, reason="test")))


def wanted(policy: PlannedReplicas) -> int:
    return policy(CONTEXT)[0]


def test_it_follows_the_plan_and_holds_the_last_one_without_redis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[PlanReader] = []

    def reader(url: str, namespace: str) -> PlanReader:
        if not readers:
            readers.append(PlanReader(Directory(url, namespace)))
        return readers[0]

    monkeypatch.setattr("experts.autoscaling.plan_reader", reader)
    with RedisServer(tmp_path / "redis") as server:
        directory = Directory(server.url, "test")
        policy = PlannedReplicas(server.url, "test", "e")
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
    assert wanted(policy) == 2
    readers[0].close()


def test_one_process_has_one_reader_for_an_application() -> None:
    with RedisServer() as server:
        first = plans.plan_reader(server.url, "a")
        assert plans.plan_reader(server.url, "a") is first
        first.close()
    plans.plan_reader.cache_clear()
