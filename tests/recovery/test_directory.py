"""The directory on the real Redis binary: leases appear, are announced, and vanish with their owner."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis

from placement import plan as plans
from placement.plan import Plan
from recovery import directory as directories
from recovery import lease as leases
from recovery.directory import Directory, DirectoryError, GatewayEntry, ReplicaEntry
from recovery.lease import Lease, Watcher
from recovery.plans import LatestPlan
from recovery.redis_server import RedisServer
from tests.waiting import eventually


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer() as running:
        yield running


@pytest.fixture
def directory(server: RedisServer) -> Directory:
    return Directory(server.url, "test")


def replica(name: str) -> ReplicaEntry:
    return ReplicaEntry(
        id=name, unit="expert-0", pid=1, node="n", host="h", addresses=[], experts=[0], layers=[0, 1], fingerprint="f"
    )


def test_an_entry_is_listed_while_its_lease_is_held(directory: Directory) -> None:
    with Lease(directory, replica("a")), Lease(directory, replica("b")):
        assert directory.replicas() == [replica("a"), replica("b")]
        assert directory.gateways() == []
    assert directory.replicas() == []


def test_a_lease_runs_out_when_its_owner_is_gone(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "LEASE_S", 0.05)
    directory.put(replica("a"))
    eventually(lambda: directory.replicas() == [])


def test_namespaces_do_not_see_each_other(server: RedisServer, directory: Directory) -> None:
    other = Directory(server.url, "other")
    with Lease(directory, replica("a")):
        assert other.replicas() == []
    assert other.secret() != directory.secret()


def test_everybody_gets_the_same_secret(directory: Directory) -> None:
    assert directory.secret() == directory.secret()
    assert len(directory.secret()) == 64


def test_a_watcher_hears_of_changes_at_once(directory: Directory) -> None:
    seen: list[list[str]] = []
    changed = threading.Condition()

    def refresh() -> None:
        with changed:
            seen.append([entry.id for entry in directory.replicas()])
            changed.notify_all()

    with Watcher(directory, refresh, period=60.0), changed:
        assert changed.wait_for(lambda: bool(seen), 10.0)
        with Lease(directory, replica("a")):
            assert changed.wait_for(lambda: seen[-1] == ["a"], 10.0)
        assert changed.wait_for(lambda: seen[-1] == [], 10.0)


def test_a_watcher_and_a_lease_outlive_redis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "redis"
    rounds: list[int] = []
    with RedisServer(folder) as first:
        directory = Directory(first.url, "test")
        lease, watcher = (
            Lease(directory, replica("a")),
            Watcher(directory, lambda: rounds.append(_count(directory)), 0.05),
        )
        lease.__enter__()
        watcher.__enter__()
        eventually(lambda: bool(rounds) and rounds[-1] == 1)
    with RedisServer(folder):
        eventually(lambda: [e.id for e in directory.replicas()] == ["a"])
        before = len(rounds)
        eventually(lambda: len(rounds) > before and rounds[-1] == 1)
        watcher.close()
        lease.close()
        assert directory.replicas() == []


def test_a_redis_that_comes_back_empty_is_told_again_what_everybody_knew(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        owner, stranger = Directory(server.url, "test"), Directory(server.url, "test")
        secret = owner.secret()
        owner.publish("plan", b"as it was")
        with Lease(owner, replica("a")):
            os.kill(server.pid, signal.SIGKILL)
            stranger.wait(10)
            stranger.secret()  # perhaps drawn by one who came too early
            eventually(lambda: [entry.id for entry in stranger.replicas()] == ["a"])
            eventually(lambda: stranger.secret() == secret)
            eventually(lambda: stranger.read("plan") == b"as it was")


def test_a_redis_that_is_killed_is_started_again(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        before = server.pid
        os.kill(before, signal.SIGKILL)
        eventually(lambda: server.pid != before)
        Directory(server.url, "test").wait(10)
    assert not (tmp_path / "redis").exists()


def _count(directory: Directory) -> int:
    return len(directory.replicas())


def test_documents_are_kept_and_first_ones_can_win(directory: Directory) -> None:
    assert directory.read("plan") is None
    directory.publish("plan", b"1", only_first=True)
    directory.publish("plan", b"2", only_first=True)
    assert directory.read("plan") == b"1"
    directory.publish("plan", b"3")
    assert directory.read("plan") == b"3"


def test_a_redis_that_is_not_there_is_named_with_the_remedy() -> None:
    with pytest.raises(DirectoryError, match=r"redis://127.0.0.1:1 does not answer .* REDIS_URL"):
        Directory("redis://127.0.0.1:1", "test").wait()


def test_a_gateway_and_a_replica_of_one_name_are_two_entries(directory: Directory) -> None:
    gateway = GatewayEntry(id="a", pid=1, node="n", host="h", addresses=["unix:@x"], fingerprint="f")
    with Lease(directory, replica("a")), Lease(directory, gateway):
        assert directory.gateways() == [gateway]
        assert directory.replicas() == [replica("a")]


def test_the_embedded_redis_leaves_nothing_behind() -> None:
    with RedisServer() as server:
        folder = Path(server.url.removeprefix("unix://")).parent
        pid = server.pid
        assert folder.exists()
    assert not folder.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(redis.RedisError):
        Directory(server.url, "test").replicas()


def test_the_embedded_redis_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from recovery.redis_server import RedisServer\n"
        "server = RedisServer(pathlib.Path(sys.argv[1])).__enter__(); print(server.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "redis")], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    eventually(lambda: not _alive(pid))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_figures_are_renewed_and_changes_are_announced(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_RENEW_S", 0.05)
    seen: list[list[tuple[int, int]]] = []
    calls = itertools.count(1)

    def watch() -> None:
        seen.append(directory.replicas()[0].slices if directory.replicas() else [])

    def figures(entry: ReplicaEntry) -> ReplicaEntry:
        return msgspec.structs.replace(entry, calls=next(calls))

    with Lease(directory, replica("a"), figures) as lease, Watcher(directory, watch, period=60.0):
        eventually(lambda: directory.replicas()[0].calls > 2)
        eventually(lambda: bool(seen))
        told = len(seen)
        lease.announce(lambda entry: msgspec.structs.replace(entry, slices=[(0, 1)]))
        eventually(lambda: seen[-1] == [(0, 1)])
        assert len(seen) == told + 1
        assert lease.entry.slices == [(0, 1)]


def test_a_change_that_redis_missed_is_told_when_it_is_back(tmp_path: Path) -> None:
    folder = tmp_path / "redis"
    with RedisServer(folder) as first:
        directory = Directory(first.url, "test")
        lease = Lease(directory, replica("a")).__enter__()
    lease.announce(lambda entry: msgspec.structs.replace(entry, draining=True))
    with RedisServer(folder):
        eventually(lambda: [e.draining for e in directory.replicas()] == [True])
        lease.close()


def test_older_plans_are_ignored(directory: Directory) -> None:
    latest = LatestPlan(directory)
    assert not latest.refresh()
    for epoch, accepted in ((2, True), (1, False), (2, True), (3, True)):
        directory.publish("plan", plans.encode(Plan(epoch=epoch, replicas={}, reason="test")))
        assert latest.refresh() is accepted
    assert latest.plan is not None
    assert latest.plan.epoch == 3
    directory.publish("plan", b"garbage")
    assert not latest.refresh()
    assert latest.plan.epoch == 3
