"""What clients notice when parts of the service are killed or hang, with real processes and SIGKILL.

Each line says its bar.   python -m bench.recovery [--rows kill,hang]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.report import RESULTS, machine
from bench.service import serving
from recovery.chaos.load import Load
from recovery.chaos.play import Happening, Outcome, outcome_of, play
from recovery.chaos.scenario import Scenario, parse_scenario
from recovery.chaos.service import Service
from recovery.directory import Directory
from recovery.redis_server import RedisServer

ONE, TWO = "{}", "gateway: {replicas: 2}"
START_S = 240.0


@dataclass(frozen=True)
class Calm:
    """The service undisturbed."""

    gap_s: float
    """Median gap between two tokens of a stream."""
    p99_s: float
    tokens_s: float
    call_s: float
    """What the gateway waits for its replicas in one layer, on average."""


@dataclass(frozen=True)
class Row:
    """A line of the table. `passed` judges beyond errors and changed tokens, which none may have."""

    what: str
    policy: str
    scenario: Callable[[bool], dict[str, Any]]
    bar: str
    passed: Callable[[Outcome, Calm], bool]
    seen: Callable[[Outcome, Calm], str]


def _extra(outcome: Outcome, calm: Calm) -> list[float]:
    """The wait that each event caused, beyond an undisturbed step; in order."""
    return sorted(happening.gap_s - calm.gap_s for happening in outcome.happenings)


def _worst(outcome: Outcome, calm: Calm) -> str:
    extra, later = _extra(outcome, calm), max(happening.longest_gap_s for happening in outcome.happenings)
    return f"extra gap median {1000 * extra[len(extra) // 2]:.0f} ms, longest {1000 * extra[-1]:.0f} ms (later on " + (
        f"{1000 * later:.0f} ms)"
    )


def _back(outcome: Outcome, calm: Calm) -> str:
    return f"{_worst(outcome, calm)}; whole after {outcome.happenings[-1].whole_after_s} s"


def _scenario(do: str, to: str, seconds: float, streams: int = 2, at: float = 2, **more: Any) -> dict[str, Any]:
    load = {"streams": streams, "max_tokens": 80, "requests": 4}
    return {"seconds": seconds, "settle": 120, "load": load, "events": [{"at": at, "do": do, "to": to, **more}]}


def _repeated(do: str, to: str, every: float, times: int, **more: Any) -> dict[str, Any]:
    return _scenario(do, to, 1 + every * times, every=every, **more)


ROWS = {
    "kill": Row(
        "expert replica killed", ONE, lambda quick: _repeated("kill", "expert", 3, 3 if quick else 10),
        "extra gap p99 at most 30 ms", lambda o, calm: _extra(o, calm)[-1] <= 0.03, _worst,
    ),
    "hang": Row(
        "expert replica hangs", ONE, lambda quick: _repeated("stop", "expert", 4, 2 if quick else 6, seconds=1.5),
        "extra gap at most 4 usual calls + 20 ms", lambda o, calm: _extra(o, calm)[-1] <= 4 * calm.call_s + 0.02,
        lambda o, calm: f"{_worst(o, calm)} (usual call {1000 * calm.call_s:.1f} ms)",
    ),
    "all": Row(
        "every replica killed at once", ONE, lambda quick: _scenario("kill", "expert", 8, count="all"),
        "inline at once, all back", lambda o, calm: o.whole, _back,
    ),
    "storm": Row(
        "one kill a second, 16 streams", ONE,
        lambda quick: _scenario("kill", "expert", 15 if quick else 60, streams=16, at=1, every=1),
        "at least 85 % of the throughput", lambda o, calm: o.tokens / o.seconds >= 0.85 * calm.tokens_s,
        lambda o, calm: f"{o.tokens / o.seconds / calm.tokens_s:.0%} of {calm.tokens_s:.0f} tokens/s",
    ),
    "gateway": Row(
        "only gateway killed", ONE, lambda quick: _repeated("kill", "gateway", 6, 1 if quick else 4),
        "streams go on when it is back", lambda o, calm: o.whole, _back,
    ),
    "gateways": Row(
        "gateway killed, second one up", TWO, lambda quick: _repeated("kill", "gateway", 6, 1 if quick else 4),
        "streams go on within 1 s", lambda o, calm: _extra(o, calm)[-1] <= 1.0, _back,
    ),
    "redis": Row(
        "Redis killed for 10 s", ONE, lambda quick: _scenario("kill", "redis", 20),
        "no effect", lambda o, calm: o.whole and _extra(o, calm)[-1] <= max(0.2, 2 * calm.p99_s), _back,
    ),
    "controller": Row(
        "Serve controller killed", ONE, lambda quick: _scenario("kill", "controller", 12),
        "no effect", lambda o, calm: o.whole and _extra(o, calm)[-1] <= max(0.2, 2 * calm.p99_s), _back,
    ),
}  # fmt: skip


def main() -> None:
    """Play the rows, one service for each policy (Redis has one of its own)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer events")
    parser.add_argument("--check", action="store_true", help="exit 1 where a bar is missed")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the service ends with this, whatever ends this
    names = [name for name in asked.rows.split(",") if name in ROWS]
    results: dict[str, dict[str, Any]] = {}
    for group in (
        [name for name in names if ROWS[name].policy == ONE and name != "redis"],
        [name for name in names if ROWS[name].policy == TWO],
        [name for name in names if name == "redis"],
    ):
        if group:
            expected: list[str] = []  # all rows ask the same
            with _service(ROWS[group[0]].policy, own_redis=group == ["redis"]) as (service, redis):
                for name in group:
                    results[name] = _play(name, service, redis, asked.quick, expected)
                    _keep(name, results[name])
    missed = [name for name, result in results.items() if not result["passed"]]
    print(
        f"recovery: {len(results) - len(missed)} of {len(results)} bars met" + (f", missed {missed}" if missed else "")
    )
    sys.exit(1 if asked.check and missed else 0)


@contextlib.contextmanager
def _service(policy: str, *, own_redis: bool) -> Iterator[tuple[Service, Path | None]]:
    """A warm service in fp32, so that tokens can be compared; with `own_redis` the folder of its Redis."""
    cache = Path(tempfile.gettempdir()) / "evermoe-bench-cache"
    cache.mkdir(exist_ok=True)
    with contextlib.ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="e-")))
        (folder / "policy.yaml").write_text(policy)
        if own_redis:
            server = RedisServer(folder / "redis", again=False)
            server.__enter__()
            exits.callback(server.__exit__)
            os.environ["REDIS_URL"] = server.url
            exits.callback(os.environ.pop, "REDIS_URL")
        with serving(["--policy", str(folder / "policy.yaml"), "--dtype", "float32"], cache) as running:
            running.first_token()
            seen: dict[str, float] = {}
            while not running.replicas_ready(seen) and running.age < START_S:
                time.sleep(0.5)
            print(f"a service with {policy} is warm after {running.age:.0f} s", flush=True)
            yield Service(running.url), folder / "redis" if own_redis else None


def _play(name: str, service: Service, redis: Path | None, quick: bool, expected: list[str]) -> dict[str, Any]:
    row = ROWS[name]
    scenario = parse_scenario(row.scenario(quick), name)
    load = Load(service.url, service.model, scenario.load, expected)
    load.undisturbed()
    expected[:] = load.expected
    calm = _calm(service, scenario, load, 4 if quick else 8)
    play_it = partial(play, scenario, service) if redis is None else partial(_without_redis, scenario, service, redis)
    outcome = play_it(expected)
    passed = not outcome.errors and not outcome.changed and row.passed(outcome, calm)
    line = f"{row.what}: {len(outcome.errors)} errors, {outcome.changed} changed of {outcome.requests}; "
    line += f"{row.seen(outcome, calm)}; undisturbed {1000 * calm.gap_s:.0f} ms, p99 {1000 * calm.p99_s:.0f} ms "
    line += f"(bar: {row.bar}) {'' if passed else 'MISSED'}"
    print(line, flush=True)
    return {"figure": line, "passed": passed, "calm": calm.__dict__, "outcome": outcome.as_json()}


def _calm(service: Service, scenario: Scenario, load: Load, seconds: float) -> Calm:
    """The same load without anything broken, and what its steps wait for replicas."""
    before, began = _waits(service), time.monotonic()
    with load:
        time.sleep(seconds)
    ended, after = time.monotonic(), _waits(service)
    outcome = outcome_of(scenario, load.answers, [], began, ended, whole=True)
    waited = (after[0] - before[0]) / max(after[1] - before[1], 1)
    return Calm(outcome.gap_p50_s, outcome.gap_p99_s, outcome.tokens / outcome.seconds, waited)


def _waits(service: Service) -> tuple[float, float]:
    """Seconds spent waiting for replicas, and how often: once a step and layer."""
    report = service.report() or {"gateways": [], "units": []}
    layers = max((len(replica["layers"]) for unit in report["units"] for replica in unit["replicas"]), default=1)
    waited = sum(gateway["step_seconds"].get("wait", 0.0) for gateway in report["gateways"])
    return waited, layers * sum(gateway["steps"] for gateway in report["gateways"])


def _without_redis(scenario: Scenario, service: Service, folder: Path, expected: list[str]) -> Outcome:
    """Redis is this process's: killed, away for ten seconds, and back without anything that it knew."""
    load = Load(service.url, service.model, scenario.load, expected)
    began = time.monotonic()
    with load:
        time.sleep(2)
        happening = Happening(2.0, "kill redis", ["redis"], [])
        _kill_redis(folder)
        time.sleep(10)
        with RedisServer(folder) as server:
            Directory(server.url, "probe").wait(5)
            while not service.whole() and time.monotonic() < began + 60:
                time.sleep(0.1)
            happening.whole_after_s = round(time.monotonic() - began - 12, 2)
            time.sleep(3)
            load.__exit__()
            whole = service.whole()
            return outcome_of(scenario, load.answers, [happening], began, time.monotonic(), whole)


def _kill_redis(folder: Path) -> None:
    import psutil

    for process in psutil.Process().children():
        if process.name() == "redis-server":
            process.kill()


def _keep(name: str, result: dict[str, Any]) -> None:
    """Raw numbers, one file for each row: rows may be run one by one."""
    RESULTS.mkdir(exist_ok=True)
    document = {"name": f"recovery-{name}", "machine": machine(), **result}
    (RESULTS / f"recovery-{name}.json").write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
