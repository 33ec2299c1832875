"""The status report: what the directory and the gateways know of a service, in one place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.api.report import make_report
from gateway.messages import GatewayStatus
from placement import plan, warm_pool
from placement.plan import Plan
from placement.policy import Policy
from placement.policy.fitting import ModelFacts
from placement.policy.published import DOCUMENT
from recovery.directory import Directory, GatewayEntry, ReplicaEntry
from recovery.policies import start_policy
from recovery.redis_server import RedisServer

MODEL = ModelFacts(name="m", experts=12, layers=(1, 2), slice_bytes=1 << 20)
GATEWAY = GatewayEntry(id="g", pid=7, node="n", host="h", addresses=[], fingerprint="f", call_s=0.001)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Directory]:
    with RedisServer(tmp_path / "redis") as server:
        yield Directory(server.url, "test")


def answer(**calls: dict[str, int]) -> GatewayStatus:
    return GatewayStatus(
        query_id=1,
        gateway="g",
        running=2,
        waiting=3,
        kv_blocks_used=0,
        kv_blocks_total=9,
        expert_calls=calls,
        inline_rows=5,
    )


def replica(name: str, unit: int, *, slices: list[tuple[int, int]], draining: bool = False) -> ReplicaEntry:
    return ReplicaEntry(
        id=name, unit=f"expert-{unit}", pid=1, node="n", host="h", addresses=[], experts=[unit], layers=[1, 2],
        fingerprint="f", slices=slices, draining=draining, resident_bytes=len(slices) << 20, rows=10, device="cuda:0",
    )  # fmt: skip


def test_units_stand_in_order_with_what_they_have_and_should_have(directory: Directory) -> None:
    bounded = Policy.model_validate({"overrides": [{"experts": [10], "min_replicas": 2}]})
    start_policy(directory, bounded, MODEL, keep=True)
    asked = Plan(epoch=3, replicas={"expert-2": 9, "expert-10": 1}, reason="all", reasons={"expert-2": "hot"})
    directory.publish(plan.DOCUMENT, plan.encode(asked))
    directory.put(replica("a", 2, slices=[(1, 2)]))
    directory.put(replica("b", 2, slices=[(1, 2), (2, 2)]))
    directory.put(replica("c", 2, slices=[(1, 2)], draining=True))
    directory.put(GATEWAY)
    report = make_report(
        "m", directory, [answer(**{"expert-2": {"replica": 4}}), answer(**{"expert-2": {"replica": 1}})]
    )
    json.dumps(report)
    assert [unit["unit"] for unit in report["units"]] == [f"expert-{number}" for number in range(12)]
    hot = report["units"][2]
    assert (hot["planned"], hot["ready"], len(hot["replicas"]), hot["reason"]) == (8, 2, 3, "hot")
    assert (hot["resident_slices"], hot["slices"], hot["resident_bytes"], hot["rows"]) == (2, 2, 4 << 20, 30)
    assert hot["replicas"][0]["device"] == "cuda:0"
    assert hot["calls"] == {"replica": 5}
    assert report["units"][10]["planned"] == 2, "bounds of the policy count before the planner has heard of them"
    assert report["units"][0]["planned"] is None
    assert report["plan"] == {"epoch": 3, "made_at": 0.0, "reason": "all"}
    assert report["policy"]["version"] == 1
    assert (report["gateways"][0]["inline_rows"], report["gateways"][0]["call_s"]) == (5, 0.001)
    assert report["gateways"][0]["waiting"] == 3


def test_where_nothing_is_known_nothing_is_said(directory: Directory) -> None:
    report = make_report("m", directory, [])
    assert [report[key] for key in ("policy", "plan", "warm_pool", "forecast")] == [None] * 4
    assert (report["units"], report["gateways"]) == ([], [])


def test_what_another_release_left_is_left_out(directory: Directory) -> None:
    for document in (DOCUMENT, plan.DOCUMENT, warm_pool.DOCUMENT, "forecast"):
        directory.publish(document, b'{"of": "tomorrow"}')
    assert make_report("m", directory, [])["plan"] is None


def test_where_redis_is_is_told_only_of_sockets(directory: Directory) -> None:
    told = make_report("m", directory, [])["directory"]
    assert told == {"namespace": "test", "socket": directory.url}
