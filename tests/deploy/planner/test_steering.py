"""From loads to published plans, on a real Redis."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from msgspec import structs

from deploy.planner.loads import ExpectedLoad
from deploy.planner.steering import ModelSlices, Steering
from placement import plan
from placement.cost import Speed
from placement.from_policy import round_settings
from placement.plan import Plan
from placement.policy import Policy, parse_policy
from placement.unit import make_units
from recovery.directory import Directory, ReplicaEntry
from tests.waiting import eventually

LAYERS, EXPERTS = (1, 2, 4), 4
POLICY = parse_policy({"planner": {"cool_down_s": 0, "idle_to_zero_s": None, "memory_mib": 15}}, "p")
UNITS = tuple(make_units(POLICY.experts.unit, EXPERTS, LAYERS))
MODEL = ModelSlices(UNITS, LAYERS, EXPERTS, slice_bytes=1 << 20, speed=Speed(1e-4, 1e-4))
FIRST = Plan(epoch=7, replicas={unit.name: 1 for unit in UNITS}, reason="first")


@pytest.fixture
def directory(redis_url: str, request: pytest.FixtureRequest) -> Directory:
    return Directory(redis_url, request.node.name)


@pytest.fixture
def steering(directory: Directory) -> Iterator[Steering]:
    directory.publish(plan.DOCUMENT, plan.encode(FIRST))
    found = steering_of(directory)
    yield found
    found.close()


def steering_of(directory: Directory, policy: Policy = POLICY) -> Steering:
    return Steering(directory, MODEL, round_settings(policy, len(UNITS)), horizon_s=1.0)


def load(hot: int | None = None) -> ExpectedLoad:
    """A thousand rows a second in every layer; most of them those of one expert."""
    rows = np.full((len(LAYERS), EXPERTS), 100.0)
    if hot is not None:
        rows[:, hot] = 5000.0
    return ExpectedLoad(rows, rows, 10.0, np.zeros_like(rows))


def replica(name: str, expert: int, **more: object) -> ReplicaEntry:
    entry = ReplicaEntry(
        id=name, unit=UNITS[expert].name, pid=1, node="n", host="h", addresses=[], experts=[expert],
        layers=list(LAYERS), fingerprint="f", slices=[(layer, expert) for layer in LAYERS],
    )  # fmt: skip
    return structs.replace(entry, **more)


def published(directory: Directory) -> Plan:
    document = directory.read(plan.DOCUMENT)
    assert document is not None
    return plan.decode(document)


def test_before_a_gateway_serves_nothing_is_planned(directory: Directory) -> None:
    steering = steering_of(directory)
    assert steering.steer(load()) is None
    assert directory.read(plan.DOCUMENT) is None
    steering.close()


def test_it_goes_on_from_the_plan_there_is(directory: Directory, steering: Steering) -> None:
    directory.put(replica("a", 0))
    decided = steering.steer(load())
    assert decided is not None
    assert published(directory).epoch == decided.epoch > FIRST.epoch
    assert [copy.layer for copy in (decided.copies or {})["a"]] == list(LAYERS)


def test_replicas_follow_the_load_from_one_expert_to_another(directory: Directory, steering: Steering) -> None:
    for expert in range(EXPERTS):
        directory.put(replica(f"r{expert}", expert))
    for hot in (2, 0):
        steering.steer(load(hot))
        wanted = published(directory)
        assert wanted.replicas[f"expert-{hot}"] > 1
        assert {count for name, count in wanted.replicas.items() if name != f"expert-{hot}"} == {1}
        assert f"expert {hot} gets 500 rows a step" in wanted.reasons[f"expert-{hot}"]


def test_an_unchanged_load_publishes_nothing(directory: Directory, steering: Steering) -> None:
    directory.put(replica("a", 0))
    steering.steer(load())
    before = published(directory)
    steering.steer(load())
    assert published(directory) == before


def test_a_redis_that_forgot_is_told_again_with_a_later_plan(directory: Directory, steering: Steering) -> None:
    directory.put(replica("a", 0))
    steering.steer(load())
    before = published(directory)
    directory._redis.delete(directory._key(plan.DOCUMENT))
    steering.steer(load())
    assert published(directory).epoch > before.epoch
    directory._redis.delete(directory._key(plan.DOCUMENT))
    directory.publish(plan.DOCUMENT, plan.encode(FIRST))  # as a gateway does
    again = steering_of(directory)
    again.steer(load(hot=1))
    again.close()
    assert published(directory).epoch >= before.epoch, "gateways ignore plans that are older than theirs"


def test_rows_leave_a_replica_that_is_told_to_go(directory: Directory, steering: Steering) -> None:
    directory.put(replica("a", 0))
    directory.put(replica("b", 0, draining=True))
    decided = steering.steer(load())
    assert decided is not None
    assert not (decided.copies or {}).get("b")


def test_replicas_that_come_and_go_are_noticed_at_once(directory: Directory, steering: Steering) -> None:
    steering.steer(load())
    assert not steering.due
    directory.put(replica("a", 0))
    eventually(lambda: steering.due, 5, "it came")
    steering.steer(load())
    assert not steering.due
    directory.remove(replica("a", 0))
    eventually(lambda: steering.due, 5, "it went")


def test_a_changed_policy_is_used_from_the_next_plan_on(directory: Directory, steering: Steering) -> None:
    directory.put(replica("a", 0))
    steering.steer(load())
    steering.use(round_settings(parse_policy({"experts": {"replicas": 2, "min_replicas": 2}}, "p"), len(UNITS)), 1.0)
    steering.steer(load())
    assert set(published(directory).replicas.values()) == {2}


def test_a_method_that_lacks_memory_leaves_the_last_plan(
    directory: Directory, steering: Steering, caplog: pytest.LogCaptureFixture
) -> None:
    policy = parse_policy({"planner": {"method": "eplb", "memory_mib": 2}}, "p")
    steering.use(round_settings(policy, len(UNITS)), 1.0)
    steering.steer(load())
    assert published(directory) == FIRST
    assert "needs a copy of each" in caplog.text


def test_without_a_load_what_is_there_is_kept(directory: Directory, steering: Steering) -> None:
    directory.put(replica("a", 0))
    steering.steer(None)
    assert published(directory).replicas == FIRST.replicas
