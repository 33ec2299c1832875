"""What experts hold over a day with idle hours: elastic, and always on. Real Serve replicas, the default model.

A day of two minutes: two busy stretches, the rest idle; the same requests on one service, first always on
(`planner.method: static`), then elastic (units go to zero after five idle seconds, which stand for an hour). Counted
are resident gibibyte-seconds of weights (replicas, and what the gateway holds itself) and of processes (replicas and
warm workers, memory of their own). Bars: weights at most 50 % of always on, p99 of TPOT at most 1.1 times, no request
fails, and the first token after idleness comes at most 1.5 times later than a warm one.   python -m bench.idle
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from bench.open_loop import Answer, run
from bench.report import finish, options
from bench.service import Service, serving
from deploy.models import DEFAULT_MODEL, cache_dir, ensure_store
from deploy.texts import token_streams
from replay.traffic import Request

WEIGHTS, TPOT, FIRST = 0.50, 1.10, 1.50
_GIB = 1 << 30
_EVERY_S = 0.5
_IDLE_S = 6.0
"""More than a unit needs to go to zero."""
_RATE = 2.0
_PROMPT, _ANSWER = 96, 32


@dataclasses.dataclass
class Day:
    """What one day cost, and how it went."""

    weights_gib_s: float = 0.0
    processes_gib_s: float = 0.0
    replicas_s: float = 0.0
    tpot_p99_ms: float = 0.0
    warm_ms: float = 0.0
    """Median time to first token."""
    after_idle_ms: list[float] = dataclasses.field(default_factory=list)
    """That of the first request after each idle stretch."""
    failed: int = 0


def day(busy_s: float, idle_s: float) -> list[Request]:
    """Idle, busy, idle, busy; requests come at random, alike for everybody."""
    store = ensure_store(DEFAULT_MODEL)
    stream = np.concatenate(list(token_streams(store.path, store.config().vocab_size).values()))
    draw = np.random.default_rng(3)
    requests = []
    for begin in (idle_s, 2 * idle_s + busy_s):
        now = begin
        while now < begin + busy_s:
            start = int(draw.integers(len(stream) - _PROMPT))
            requests.append(Request(now, "any", stream[start : start + _PROMPT], _ANSWER, _ANSWER, 0))
            now += float(draw.exponential(1 / _RATE))
    return requests


def watch(service: Service, day: Day, ended: threading.Event) -> None:
    """Add up what is resident until the day has `ended`."""
    last = time.monotonic()
    while not ended.wait(_EVERY_S):
        report = service.status()
        now = time.monotonic()
        span, last = now - last, now
        replicas = [replica for unit in report["units"] for replica in unit["replicas"]]
        inline = sum(gateway["inline_bytes"] for gateway in report["gateways"])
        day.weights_gib_s += span * (sum(replica["resident_bytes"] for replica in replicas) + inline) / _GIB
        warm = (report["warm_pool"] or {}).get("pids", [])
        day.processes_gib_s += span * sum(_own(pid) for pid in [*(replica["pid"] for replica in replicas), *warm])
        day.replicas_s += span * len(replicas)


def _own(pid: int) -> float:
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.NoSuchProcess:
        return 0.0
    return float(memory.rss - memory.shared) / _GIB


def live(service: Service, requests: Sequence[Request]) -> Day:
    """One day."""
    lived, ended = Day(), threading.Event()
    watcher = threading.Thread(target=watch, args=(service, lived, ended))
    watcher.start()
    try:
        answers = run(service.url, service.model, requests)
    finally:
        ended.set()
        watcher.join()
    good = [answer for answer in answers if not answer.error and answer.token_s]
    lived.failed = len(answers) - len(good)
    lived.tpot_p99_ms = 1000 * float(np.percentile([answer.tpot_s for answer in good if answer.tpot_s], 99))
    lived.warm_ms = 1000 * statistics.median(answer.ttft_s for answer in good)
    lived.after_idle_ms = [1000 * answer.ttft_s for answer in _first(good)]
    return lived


def _first(answers: Sequence[Answer]) -> list[Answer]:
    """Those that nothing came before for a while."""
    before = [-np.inf, *(answer.due_s for answer in answers)]
    return [answer for answer, last in zip(answers, before, strict=False) if answer.due_s - last > _IDLE_S]


def policy(*, elastic: bool) -> dict[str, Any]:
    """Always on, or down to zero after five seconds."""
    planner = {"method": "evermoe", "idle_to_zero_s": 5, "cool_down_s": 2} if elastic else {"method": "static"}
    return {"planner": planner}


def main() -> None:
    """Measure, print and keep the figures."""
    opts = options(__doc__ or "")
    busy_s, idle_s = (6.0, 8.0) if opts.quick else (20.0, 40.0)
    requests = day(busy_s, idle_s)
    days = {}
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "first.yaml"
        file.write_text(yaml.safe_dump(policy(elastic=False)))
        with serving(["--policy", str(file)], cache_dir()) as service:
            service.first_token()
            seen: dict[str, float] = {}
            while not service.replicas_ready(seen):
                time.sleep(0.5)
            days["always on"] = live(service, requests)
            service.apply(policy(elastic=True))
            days["elastic"] = live(service, requests)
    for which, lived in days.items():
        print(
            f"  {which:9} weights {1024 * lived.weights_gib_s:.1f} MiB s, processes {lived.processes_gib_s:.1f} GiB s, "
            f"p99 TPOT {lived.tpot_p99_ms:.1f} ms, first token {lived.warm_ms:.0f} ms, after idleness "
            f"{', '.join(f'{each:.0f}' for each in lived.after_idle_ms)} ms, {lived.failed} failed"
        )
    on, elastic = days["always on"], days["elastic"]
    weights, processes = (
        elastic.weights_gib_s / on.weights_gib_s, elastic.processes_gib_s / on.processes_gib_s
    )  # fmt: skip
    tpot = elastic.tpot_p99_ms / on.tpot_p99_ms
    first = statistics.median(elastic.after_idle_ms) / on.warm_ms
    passed = weights <= WEIGHTS and tpot <= TPOT and first <= FIRST and not (on.failed or elastic.failed)
    figure = (
        f"idle hours: weights resident {weights:.0%} of always on (bar {WEIGHTS:.0%}; processes {processes:.0%}), "
        f"p99 TPOT {tpot:.2f}x (bar {TPOT}x), first token after idleness {first:.2f}x warm (bar {FIRST}x)"
    )
    raw = {which: dataclasses.asdict(lived) for which, lived in days.items()}
    finish("idle", raw, figure, passed=passed, check=opts.check)


if __name__ == "__main__":
    main()
