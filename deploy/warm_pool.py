"""The warm pool of a cluster that the launcher started: idle Ray workers with torch loaded, for new replicas.

Ray gives an actor that starts an idle worker where it has one. Here it is asked for them one by one, and only while no
replica is starting: those come first.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import redis

from experts.preload import READY, TOKEN
from placement import plan, warm_pool
from placement.warm_pool import WarmWorkers
from recovery.directory import Directory
from recovery.policies import PolicyReader

log = logging.getLogger(__name__)

_LOOK_S = 0.5
_PATIENCE_S = 30.0
"""What a worker has to load torch, and how long the pool waits for replicas that do not come."""
_KEEP_S = 10 * 365 * 86400
_IDLE = "ray::IDLE"
"""What Ray calls a worker without work, in the list of processes."""


class WarmPool:
    """Keeps as many warm workers as the policy in the directory says (`planner.warm_pool`) until closed.

    Workers of this host leave word in `folder` (see `experts.preload`); `start_worker` asks Ray for one.
    """

    def __init__(self, directory: Directory, folder: Path, start_worker: Callable[[], None]) -> None:
        folder.mkdir(exist_ok=True)
        self._directory = directory
        self._folder = folder
        self._start_worker = start_worker
        self._tokens = itertools.count()
        self._asked: tuple[float, frozenset[int]] | None = None
        self._waiting_since: float | None = None
        self._told: WarmWorkers | None = None
        self._stop = threading.Event()
        self._policies = PolicyReader(directory)
        self._thread = threading.Thread(target=self._run, name="warm-pool", daemon=True)
        self._thread.start()

    def __enter__(self) -> WarmPool:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; the workers end with their cluster."""
        self._stop.set()
        self._thread.join()
        self._policies.close()

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_S):
            policy = self._policies.policy
            if policy is None:
                continue
            try:
                self._look(policy.planner.warm_pool)
            except (redis.RedisError, OSError, RuntimeError) as error:
                log.warning("the warm pool is not looked after at the moment: %s", error)

    def _look(self, wanted: int) -> None:
        warmed = frozenset(int(file.name.removeprefix(READY)) for file in self._folder.glob(f"{READY}*"))
        idle = [pid for pid in sorted(warmed) if _idle(pid)]
        for pid in warmed.difference(idle):
            (self._folder / f"{READY}{pid}").unlink()
        for pid in idle[wanted:]:
            os.kill(pid, signal.SIGTERM)
        if len(idle) < wanted and not self._coming(warmed) and not self._replicas_start():
            self._ask(warmed)
        self._tell(WarmWorkers(wanted=wanted, ready=min(len(idle), wanted)))

    def _coming(self, warmed: frozenset[int]) -> bool:
        """Whether the worker that was asked for last is still on its way."""
        if self._asked is None:
            return False
        asked_at, before = self._asked
        return warmed <= before and time.monotonic() - asked_at < _PATIENCE_S

    def _replicas_start(self) -> bool:
        """Whether replicas that are planned are not there yet, and may still come."""
        document = self._directory.read(plan.DOCUMENT)
        there = Counter(entry.unit for entry in self._directory.replicas())
        planned = None if document is None else plan.decode(document).replicas
        if planned is not None and all(there[unit] >= count for unit, count in planned.items()):
            self._waiting_since = None
            return False
        now = time.monotonic()
        self._waiting_since = self._waiting_since or now
        return planned is None or now - self._waiting_since < _PATIENCE_S

    def _ask(self, warmed: frozenset[int]) -> None:
        for token in self._folder.glob(f"{TOKEN}*"):  # of a worker that did not come
            token.unlink(missing_ok=True)
        (self._folder / f"{TOKEN}{next(self._tokens)}").touch()
        self._asked = time.monotonic(), warmed
        self._start_worker()

    def _tell(self, workers: WarmWorkers) -> None:
        if workers != self._told:
            self._directory.publish(warm_pool.DOCUMENT, warm_pool.encode(workers))
            self._told = workers


def start_worker() -> None:
    """Ask this host's Ray for one more idle worker; raise RuntimeError where it does not take such a call."""
    import grpc
    import ray
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.common_pb2 import PYTHON
    from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
    from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

    request = PrestartWorkersRequest(language=PYTHON, num_workers=1, keep_alive_duration_secs=_KEEP_S)
    request.runtime_env_info.serialized_runtime_env = "{}"
    node = ray.nodes()[0]
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        try:
            NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=_PATIENCE_S)
        except grpc.RpcError as error:
            raise RuntimeError(f"Ray starts no workers ahead: {error}") from error


def _idle(pid: int) -> bool:
    """Whether there is such a process, and Ray calls it idle."""
    try:
        return psutil.Process(pid).cmdline()[0].split()[0] == _IDLE
    except (psutil.Error, IndexError):  # gone, or just ending
        return False
