"""The warm pool: as many idle workers as the policy says, one by one, never before replicas."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.warm_pool import WarmPool
from experts.preload import READY, TOKEN
from placement import plan, warm_pool
from placement.plan import Plan
from placement.policy import Policy
from placement.policy.fitting import ModelFacts
from placement.warm_pool import WarmWorkers
from recovery.directory import Directory, ReplicaEntry
from recovery.policies import start_policy
from recovery.redis_server import RedisServer
from tests.waiting import eventually

MODEL = ModelFacts(name="m", experts=1, layers=(0,), slice_bytes=1 << 20)


class Workers:
    """What Ray does when it is asked for a worker: a process that calls itself idle, and does as `experts.preload`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        (token,) = self.folder.glob(f"{TOKEN}*")
        token.unlink()
        worker = subprocess.Popen(["/bin/bash", "-c", "exec -a ray::IDLE sleep 1000"])
        self.processes.append(worker)
        eventually(lambda: Path(f"/proc/{worker.pid}/cmdline").read_bytes().startswith(b"ray::IDLE"))
        (self.folder / f"{READY}{worker.pid}").touch()

    def take(self) -> None:
        """An actor starts in the oldest worker: it is called something else from then on."""
        self.processes[0].kill()
        self.processes.pop(0).wait()

    def close(self) -> None:
        for worker in self.processes:
            worker.kill()
            worker.wait()


class Pool:
    """A pool, its workers and what it is told."""

    def __init__(self, directory: Directory, folder: Path) -> None:
        self.directory = directory
        self.workers = Workers(folder)

    def want(self, count: int) -> None:
        start_policy(self.directory, Policy.model_validate({"planner": {"warm_pool": count}}), MODEL, keep=False)

    def plan(self, epoch: int, replicas: int) -> None:
        asked = Plan(epoch=epoch, replicas={"e": replicas}, reason="test")
        self.directory.publish(plan.DOCUMENT, plan.encode(asked))

    def told(self) -> WarmWorkers | None:
        document = self.directory.read(warm_pool.DOCUMENT)
        return None if document is None else warm_pool.decode(document)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    folder = tmp_path / "pool"
    with RedisServer(tmp_path / "redis") as server:
        pool = Pool(Directory(server.url, "test"), folder)
        with contextlib.closing(pool.workers), WarmPool(pool.directory, folder, pool.workers.start):
            yield pool


def replica() -> ReplicaEntry:
    return ReplicaEntry(
        id="r", unit="e", pid=1, node="n", host="h", addresses=[], experts=[0], layers=[0], fingerprint="f"
    )


def test_it_is_filled_kept_full_and_emptied(pool: Pool) -> None:
    pool.plan(1, 0)
    pool.want(2)
    eventually(lambda: pool.told() == WarmWorkers(wanted=2, ready=2))
    assert len(pool.workers.processes) == 2
    pool.workers.take()
    eventually(lambda: len(pool.workers.processes) == 2 and pool.told() == WarmWorkers(wanted=2, ready=2))
    pool.want(1)
    eventually(lambda: pool.told() == WarmWorkers(wanted=1, ready=1))
    eventually(lambda: sorted(worker.poll() is None for worker in pool.workers.processes) == [False, True])


def test_replicas_come_first(pool: Pool) -> None:
    pool.want(1)
    eventually(lambda: pool.told() == WarmWorkers(wanted=1, ready=0), what="without a plan nothing is started")
    pool.plan(1, 1)
    pool.want(2)
    eventually(lambda: pool.told() == WarmWorkers(wanted=2, ready=0), what="the pool looked after the plan was there")
    assert pool.workers.processes == []
    pool.directory.put(replica())
    eventually(lambda: len(pool.workers.processes) == 1)
