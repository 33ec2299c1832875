"""From a plan that asks for one more replica to the first rows it computes: with a warm worker, and without.

Bar: a warm one takes half the time at most.   python -m bench.warm_pool
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from bench.report import finish, options
from bench.service import Service, serving
from deploy.running import find_running
from placement.policy import parse_policy

BAR = 0.5
POLICY = """
experts: {unit: {experts: 8}, replicas: %d}
gateway: {compile: false}
predictor: {enabled: false}
planner: {warm_pool: %d}
"""
_LIMIT_S = 120.0


def main() -> None:
    """Start the one replica there is again and again, with and without a worker that waits for it."""
    opts = options(__doc__ or "")
    rounds = 2 if opts.quick else 5
    seconds: dict[int, list[float]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "policy.yaml")
        file.write_text(POLICY % (0, 0))
        with serving(["--policy", str(file)], Path(folder, "cache")) as service, _traffic(service):
            for _, warm in itertools.product(range(rounds), seconds):
                seconds[warm].append(_start(service, warm))
                print(f"warm pool {warm}: {seconds[warm][-1]:.2f} s", flush=True)
    cold, warm_s = (statistics.median(seconds[warm]) for warm in (0, 1))
    ratio = warm_s / cold
    figure = f"warm_pool: from the plan to the first row {warm_s:.1f} s, cold {cold:.1f} s: {ratio:.2f}x (bar {BAR:g}x)"
    finish("warm_pool", {"seconds": seconds}, figure, passed=ratio <= BAR, check=opts.check)


def _start(service: Service, warm: int) -> float:
    """Seconds to the first row of a replica that was not there before."""
    _apply(service, 0, warm)
    _until(lambda: _replicas(service) == 0, "the replica is gone")
    _until(lambda: _warm_workers(service) == warm, "the pool is as it should be")
    before = _calls(service)
    started = _apply(service, 1, warm)
    _until(lambda: _calls(service) > before, "the replica is used")
    return time.perf_counter() - started


def _apply(service: Service, replicas: int, warm: int) -> float:
    """Change the service's policy; the moment."""
    running = find_running(service.url, None)
    policy = parse_policy(yaml.safe_load(POLICY % (replicas, warm)), "policy")
    started = time.perf_counter()
    running.apply(policy)
    return started


@contextmanager
def _traffic(service: Service) -> Iterator[None]:
    """One client that asks all the time."""
    service.first_token()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            for _ in service.stream("def main():", 100):
                if stop.is_set():
                    break
                time.sleep(0.02)  # leaves the cores to what is measured

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _until(there: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while not there():
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {_LIMIT_S:.0f} s in vain until {what}")
        time.sleep(0.02)


def _replicas(service: Service) -> int:
    return sum(unit["ready"] for unit in service.status()["units"])


def _calls(service: Service) -> int:
    return sum(unit["calls"].get("replica", 0) for unit in service.status()["units"])


def _warm_workers(service: Service) -> int:
    return int((service.status()["warm_pool"] or {}).get("ready", -1))


if __name__ == "__main__":
    main()
