"""The policy that a service runs: published, followed, changed by one operator at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from placement.policy import Policy
from placement.policy.bounds import Bounds
from placement.policy.fitting import ModelFacts
from placement.policy.published import DOCUMENT, PublishedPolicy, encode
from placement.unit import Unit
from recovery.directory import Directory
from recovery.policies import PolicyReader, read_policy, start_policy
from recovery.redis_server import RedisServer
from tests.waiting import eventually

MODEL = ModelFacts(name="m", experts=2, layers=(0, 1), slice_bytes=1 << 20)
FEW = Policy.model_validate({"experts": {"max_replicas": 2}})
MANY = Policy.model_validate({"experts": {"max_replicas": 9}, "overrides": [{"layers": [1], "pin": True}]})


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with RedisServer(tmp_path / "redis") as server:
        yield Directory(server.url, "test")


def test_a_gateway_that_starts_again_keeps_what_was_applied_and_a_service_does_not(directory: Directory) -> None:
    def known() -> tuple[int, Policy] | None:
        found = read_policy(directory)
        return None if found is None else (found.version, found.read())

    assert known() is None
    start_policy(directory, FEW, MODEL, keep=True)
    assert known() == (1, FEW)
    start_policy(directory, MANY, MODEL, keep=True)
    assert known() == (1, FEW)
    start_policy(directory, MANY, MODEL, keep=False)
    assert known() == (2, MANY)


def test_a_reader_tells_of_each_policy_and_keeps_the_last_it_understood(directory: Directory) -> None:
    told: list[Policy] = []
    with PolicyReader(directory, told.append) as reader:
        assert (reader.policy, reader.version, reader.bounds(Unit("e", (0,), (0, 1)))) == (None, 0, None)
        start_policy(directory, FEW, MODEL, keep=True)
        eventually(lambda: reader.version == 1)
        assert reader.bounds(Unit("e", (0,), (0, 1))) == Bounds(0, 2)
        directory.publish(DOCUMENT, b"{oops")
        newer = PublishedPolicy(version=2, made_at=0.0, model=MODEL, policy={"experts": {"of_tomorrow": 1}})
        directory.publish(DOCUMENT, encode(newer))
        directory.publish(DOCUMENT, encode(PublishedPolicy.of(MANY, MODEL, 3, 0.0)))
        eventually(lambda: reader.version == 3)
        assert reader.bounds(Unit("e", (0,), (0, 1))) == Bounds(1, 9)
    assert told == [FEW, MANY]


def test_of_two_operators_at_once_one_is_refused(directory: Directory) -> None:
    assert directory.exchange("document", None, b"first")
    assert not directory.exchange("document", None, b"second")
    assert directory.exchange("document", b"first", b"second")
    assert not directory.exchange("document", b"first", b"third")
    assert directory.read("document") == b"second"
