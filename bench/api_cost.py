"""What the HTTP edge costs: 32 streams at 1,000 tokens/s in all, through the api's own port and through Serve's proxy.

Bar: the api process takes under half a core on its own port.   python -m bench.api_cost
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from bench.report import finish, options
from deploy.launcher import local_ray
from deploy.models import DEFAULT_MODEL
from experts.wire.sockets import host_id
from gateway.api.deployment import api_deployment
from gateway.api.served_model import ApiConfig
from gateway.link import GatewayServer
from gateway.messages import Delta, GatewayStatus, Submit
from recovery.directory import Directory, GatewayEntry
from recovery.lease import Lease
from recovery.redis_server import RedisServer

STREAMS = 32
TOKENS_PER_S = 1000.0
BAR_CORES = 0.5
FINGERPRINT = "0123456789abcdef"
NAMESPACE = "bench"


class Metronome:
    """An engine without a model: every running sequence gets a token, as often as `TOKENS_PER_S` allows for all."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[Submit, int]] = {}
        self._next = time.perf_counter()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._running)

    def add(self, submit: Submit) -> None:
        """Take a sequence in."""
        self._running[submit.request_id] = (submit, 0)

    def prepare(self, submit: Submit) -> None:
        """Nothing takes time."""

    def cancel(self, request_id: str) -> None:
        """Drop a sequence."""
        self._running.pop(request_id, None)

    def step(self) -> list[Delta]:
        """One token for each sequence, when their time has come."""
        time.sleep(max(0.0, self._next - time.perf_counter()))
        self._next = max(self._next, time.perf_counter() - 0.1) + STREAMS / TOKENS_PER_S
        return [self._advance(request_id) for request_id in list(self._running)]

    def _advance(self, request_id: str) -> Delta:
        submit, position = self._running[request_id]
        position += 1
        self._running[request_id] = (submit, position)
        ends = position >= submit.params.max_tokens
        if ends:
            del self._running[request_id]
        token = 300 + (7 * position) % 500  # words of the default model's vocabulary
        return Delta(request_id=request_id, token_ids=[token], finish_reason="length" if ends else None)

    def status(self, query_id: int) -> GatewayStatus:
        """Nothing much."""
        return GatewayStatus(
            query_id=query_id, gateway="metronome", running=len(self._running), waiting=0, kv_blocks_used=0,
            kv_blocks_total=0, expert_calls={},
        )  # fmt: skip


def run_gateway(redis_url: str) -> None:
    """A gateway process around a metronome."""

    async def main() -> None:
        directory = Directory(redis_url, NAMESPACE)
        engine = Metronome()
        server = GatewayServer(engine, secret=directory.secret(), fingerprint=FINGERPRINT, status=engine.status)
        async with server:
            entry = GatewayEntry(
                id="metronome", pid=os.getpid(), node="here", host=host_id(), addresses=server.addresses,
                fingerprint=FINGERPRINT,
            )  # fmt: skip
            with Lease(directory, entry):
                await asyncio.Event().wait()

    asyncio.run(main())


class Clients:
    """Raw sockets that ask for endless streams and count what they get, in a process of their own."""

    def __init__(self, port: int, model: str, streams: int, seconds: float) -> None:
        self._body = {"model": model, "prompt": [5, 6, 7], "max_tokens": 10**6, "stream": True, "ignore_eos": True}
        self._port = port
        self._streams = streams
        self._seconds = seconds

    def run(self, results: Any) -> None:
        """Put (pid times are the parent's business) the number of chunks that came in the seconds of measurement."""
        asyncio.run(self._main(results))

    async def _main(self, results: Any) -> None:
        counts = [0]
        tasks = [asyncio.create_task(self._stream(counts)) for _ in range(self._streams)]
        await asyncio.sleep(2.0)
        before, start = counts[0], time.perf_counter()
        results.put("measuring")
        await asyncio.sleep(self._seconds)
        results.put((counts[0] - before) / (time.perf_counter() - start))
        for task in tasks:
            task.cancel()

    async def _stream(self, counts: list[int]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        content = json.dumps(self._body).encode()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(content) + content
        )
        while data := await reader.read(1 << 16):
            counts[0] += data.count(b"data: ")


def measure(port: int, model: str, pids: dict[str, int], seconds: float) -> dict[str, float]:
    """Tokens/s that arrived, and the share of a core that each process took meanwhile."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    clients = context.Process(target=Clients(port, model, STREAMS, seconds).run, args=(results,))
    clients.start()
    assert results.get(timeout=60) == "measuring"
    start, before = time.perf_counter(), {name: cpu(pid) for name, pid in pids.items()}
    rate = results.get(timeout=seconds + 60)
    elapsed = time.perf_counter() - start
    used = {name: (cpu(pid) - before[name]) / elapsed for name, pid in pids.items()}
    clients.join()
    return {"tokens_per_s": rate, **used}


def cpu(pid: int) -> float:
    """Seconds of processor time a process has taken."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@contextlib.contextmanager
def gateway(redis_url: str) -> Iterator[None]:
    """A gateway process."""
    process = multiprocessing.get_context("spawn").Process(target=run_gateway, args=(redis_url,), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def free_port() -> int:
    """A port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def pid_of(name: str) -> int:
    """The Ray worker of a Serve actor, by what its process title shows."""
    for process in psutil.process_iter(["cmdline"]):
        if name in " ".join(process.info["cmdline"] or []):
            return int(process.pid)
    raise RuntimeError(f"no process is called {name}")


def deploy(redis_url: str, port: int | None) -> None:
    """The api alone, on a port of its own or behind Serve's proxy."""
    from ray import serve

    config = ApiConfig(store=DEFAULT_MODEL, model_name="bench", context_length=1 << 30)
    listen = None if port is None else ("127.0.0.1", port)
    serve.run(api_deployment(config, FINGERPRINT, redis_url, NAMESPACE, listen, []), name="bench", route_prefix="/")


def main() -> None:
    """Run the comparison."""
    opts = options(__doc__ or "")
    seconds, rounds = (5.0, 1) if opts.quick else (15.0, 3)
    folder = Path(tempfile.mkdtemp(prefix="evermoe-", dir="/tmp"))
    ports = {"own": free_port(), "proxy": free_port()}
    raw: dict[str, list[dict[str, float]]] = {"own": [], "proxy": []}
    try:
        with RedisServer(folder / "redis") as redis, gateway(redis.url), local_ray(folder):
            from ray import serve

            serve.start(http_options={"host": "127.0.0.1", "port": ports["proxy"]}, proxy_location="HeadOnly")
            deploy(redis.url, ports["own"])
            pids = {"api": pid_of("ServeReplica:bench:api"), "proxy": pid_of("ray::ProxyActor")}
            for _ in range(rounds):
                for way, port in ports.items():
                    raw[way].append(measure(port, "bench", pids, seconds))
                    print(way, {name: round(value, 3) for name, value in raw[way][-1].items()}, flush=True)
            serve.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(raw, opts)


def report(raw: dict[str, list[dict[str, float]]], opts: argparse.Namespace) -> None:
    """Print the medians and the figure."""

    def median(way: str, name: str) -> float:
        values = sorted(run[name] for run in raw[way])
        return values[len(values) // 2]

    own, behind = median("own", "api"), median("proxy", "api") + median("proxy", "proxy")
    rate = median("own", "tokens_per_s")
    finish(
        "api_cost",
        {"runs": raw},
        f"{rate:.0f} tokens/s over {STREAMS} streams cost the api {own:.3f} of a core; behind Serve's proxy "
        f"{behind:.3f} (api {median('proxy', 'api'):.3f}, proxy {median('proxy', 'proxy'):.3f})",
        passed=own < BAR_CORES and rate > 0.95 * TOKENS_PER_S,
        check=opts.check,
    )


if __name__ == "__main__":
    main()
