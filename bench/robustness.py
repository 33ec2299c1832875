"""Clients that vanish, malformed requests, prompts of every length around the limits, a crowd that queues.

Bar: no 5xx, no hang, the next good request is answered, gauges return to zero, memory does not grow.
python -m bench.robustness
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from bench.malformed import Malformed, malformed
from bench.raw_http import exchange, vanish
from bench.report import finish, options
from bench.service import Service, serving

GROWTH = {"api": 1.05, "gateway": 1.25}
"""Memory at the end, as a multiple of that after the warm-up, at most. Each new number of rows in a batch leaves its
kernels in oneDNN's cache, which holds a thousand: the gateway's memory levels off late."""
TOGETHER = 64
GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
QUIET_S = 60.0
POLICY = "gateway: {kv_cache_gib: 0.03}"  # touched as a whole by the warm-up: what grows later is a leak


@dataclass(frozen=True)
class Load:
    """How much of each."""

    vanishing: int
    malformed: int
    lengths: tuple[int, ...]
    queued: int


class Server:
    """The service under test."""

    def __init__(self, service: Service) -> None:
        report = service.status()
        self.url = service.url
        self.port = int(service.url.rpartition(":")[2])
        self.model = report["model"]
        self.context = httpx.get(f"{self.url}/v1/models").json()["data"][0]["max_model_len"]
        children = psutil.Process(service.process.pid).children(recursive=True)
        (api,) = [child for child in children if "ServeReplica:evermoe:api" in " ".join(child.cmdline())]
        self.processes = {"api": api, "gateway": psutil.Process(report["gateways"][0]["pid"])}

    def memory(self) -> dict[str, float]:
        """MiB that each process holds for itself: pages mapped from files, weights above all, come and go."""
        return {name: process.memory_full_info().uss / 2**20 for name, process in self.processes.items()}

    def gauges(self) -> dict[str, float]:
        """The three figures that have to return to zero."""
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        found = {family.name: family for family in text_string_to_metric_families(text)}
        return {name: found[name].samples[0].value for name in GAUGES}

    def quiet(self) -> dict[str, float]:
        """The gauges once they are zero, or what they are still after a minute."""
        deadline = time.monotonic() + QUIET_S
        while any((gauges := self.gauges()).values()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return gauges

    def good_request(self) -> int:
        """The status of a request with nothing wrong."""
        body = {"model": self.model, "prompt": "def add(a, b):", "max_tokens": 8}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60).status_code

    def post(self, **body: Any) -> bytes:
        """A completion request as bytes."""
        content = json.dumps({"model": self.model, "max_tokens": 1, **body}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
        return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def vanishing(server: Server, count: int) -> Counter[str]:
    """Clients that leave a long stream after some of it, every second one with a TCP reset."""
    data = server.post(prompt="import os", max_tokens=1000, stream=True, ignore_eos=True)

    async def one(number: int) -> str:
        await vanish(server.port, data, 100 * (number % 20), reset=number % 2 == 0)
        return "vanished"

    return await _together(map(one, range(count)))


async def broken(server: Server, requests: Iterable[Malformed]) -> Counter[str]:
    """Malformed requests: statuses."""

    async def one(request: Malformed) -> str:
        answer = await exchange(server.port, request.data, wait=request.complete)
        if answer is None:
            return "no answer to a whole request" if request.complete else "hung up"
        if answer.status >= 400 and answer.body and "error" not in json.loads(answer.body):
            return "wrong shape"
        return str(answer.status)

    return await _together(map(one, requests))


async def long_prompts(server: Server, lengths: Iterable[int]) -> Counter[str]:
    """Prompts of so many tokens: those that leave no room for an answer are refused, the others are not."""

    async def one(length: int) -> str:
        answer = await exchange(server.port, server.post(prompt=[300] * length))
        right = 200 if 1 <= length < server.context else 400
        return str(answer.status) if answer is not None and answer.status == right else f"wrong at {length}: {answer}"

    return await _together(map(one, lengths), 8)


async def queued(server: Server, count: int) -> Counter[str]:
    """That many requests at the same time."""

    async def one(number: int) -> str:
        answer = await exchange(server.port, server.post(prompt=[300 + number % 100] * 4, max_tokens=2))
        return str(answer.status) if answer is not None else "no answer"

    return await _together(map(one, range(count)), count)


async def _together(work: Iterable[Awaitable[str]], most: int = TOGETHER) -> Counter[str]:
    places = asyncio.Semaphore(most)

    async def placed(one: Awaitable[str]) -> str:
        async with places:
            return await one

    return Counter(await asyncio.gather(*map(placed, work)))


def run(server: Server, load: Load, seed: int) -> dict[str, Counter[str]]:
    """All four, one after the other."""
    steps: dict[str, Callable[[], Awaitable[Counter[str]]]] = {
        "vanishing": lambda: vanishing(server, load.vanishing),
        "malformed": lambda: broken(server, malformed(load.malformed, seed)),
        "lengths": lambda: long_prompts(server, load.lengths),
        "queued": lambda: queued(server, load.queued),
    }
    counts: dict[str, Counter[str]] = {}
    for name, step in steps.items():
        start = time.perf_counter()
        counts[name] = asyncio.run(_awaited(step))
        seconds = time.perf_counter() - start
        memory = " ".join(f"{process} {mib:.0f}" for process, mib in server.memory().items())
        print(f"{name:10} {seconds:6.1f} s  {memory} MiB  {dict(counts[name].most_common())}", flush=True)
    return counts


async def _awaited(step: Callable[[], Awaitable[Counter[str]]]) -> Counter[str]:
    return await step()


def around(context: int, reach: int) -> tuple[int, ...]:
    """Lengths around what may be a limit: nothing, a cache block, a step's budget, the context."""
    spots = (0, 16, 512, context)
    return tuple(sorted({length for spot in spots for length in range(max(0, spot - reach), spot + reach + 1)}))


def main() -> None:
    """Run it against a service of its own."""
    opts = options(__doc__ or "")
    cache = Path(tempfile.gettempdir()) / "evermoe-bench-cache"
    cache.mkdir(exist_ok=True)
    policy = cache / "robustness.yaml"
    policy.write_text(POLICY)
    with serving(["--policy", str(policy)], cache) as service:
        service.first_token()
        seen: dict[str, float] = {}
        while not service.replicas_ready(seen):
            time.sleep(0.5)
        server = Server(service)
        reach = 2 if opts.quick else 16
        load = (
            Load(40, 1000, around(server.context, reach), 200)
            if opts.quick
            else Load(200, 10_000, around(server.context, reach), 2000)
        )
        print("warm-up", flush=True)
        run(server, replace(load, malformed=load.malformed // 10), seed=1)
        server.quiet()
        before = server.memory()
        print("measured", flush=True)
        counts = run(server, load, seed=2)
        good, gauges = server.good_request(), server.quiet()
        after = server.memory()
    report(opts.check, load, counts, good, gauges, before, after)


def report(
    check: bool,
    load: Load,
    counts: dict[str, Counter[str]],
    good: int,
    gauges: dict[str, float],
    before: dict[str, float],
    after: dict[str, float],
) -> None:
    """Print what came of it and the figure."""
    print(f"next good request {good}; gauges {gauges}")
    memory = ", ".join(f"{name} {before[name]:.0f} -> {after[name]:.0f} MiB" for name in before)
    bad = Counter(
        {what: n for count in counts.values() for what, n in count.items() if not what.isdigit() or what >= "500"}
    )
    for harmless in ("vanished", "hung up"):
        bad.pop(harmless, None)
    passed = not bad and good == 200 and not any(gauges.values())
    passed = passed and all(after[name] < GROWTH[name] * before[name] for name in before)
    finish(
        "robustness",
        {"counts": {name: dict(count) for name, count in counts.items()}, "before": before, "after": after},
        f"{load.vanishing} vanished, {load.malformed} malformed, {len(load.lengths)} lengths, {load.queued} at once: "
        f"{sum(bad.values())} wrong answers {dict(bad) or ''}, then {good}, gauges {list(gauges.values())}, {memory}",
        passed=passed,
        check=check,
    )


if __name__ == "__main__":
    main()
