"""What it costs an engine that its routing is watched, learned from, recorded and streamed.

The default model, every expert inline, decoder layers compiled; the same 32 prompts of 170 tokens, 64 tokens out, on
one engine in turn: plain, with its steps only noted, and with everything that follows beside it. Bar: at most 2 % of
the time (the mean of the turns' ratios but for the tenth at either end).   python -m bench.record
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.report import finish, options
from deploy.models import DEFAULT_MODEL, cache_dir, ensure_store
from deploy.virtual_engine import NoFleet
from experts import kernels
from experts.families import moe_modules
from experts.ffn import ExpertFFN
from experts.native_code import NoCompilerError
from experts.store import ExpertStore
from gateway import compilation
from gateway.dispatch import Dispatcher
from gateway.engine import Engine, EngineSettings
from gateway.load_feed import LoadFeed
from gateway.look_ahead import Gates
from gateway.messages import SamplingParams, Submit
from gateway.model import load_model
from gateway.routing_chunk import Hello, RoutingChunk
from gateway.routing_log import RoutingLog
from gateway.routing_packer import RoutingPacker
from predictor.records import read_records
from predictor.shape import ModelShape
from recovery.redis_server import RedisServer

BAR = 1.02
SEQUENCES, PROMPT, ANSWER = 32, 170, 64
MODES = ("plain", "noted", "told")
_WARM = 2
_OBSERVER_S = 0.2


def engine(store: ExpertStore, routing: RoutingLog) -> Engine:
    """A gateway's engine, which `routing` can watch."""
    kernels.load(cache_dir() / "compiled")
    inline = ExpertFFN(store, fast=True)
    for layer, expert in store.slices:
        inline.load(layer, expert)
    manifest = store.manifest
    dispatcher = Dispatcher(NoFleet(), inline, manifest.num_experts, 32, 1.0)
    model = load_model(store, experts=routing.watch(dispatcher))
    compilation.adopt(model, cache_dir() / "compiled")
    model.threads = os.cpu_count()
    routing.gates = Gates(model.network, moe_modules(model.network), manifest.top_k)
    return Engine(model, EngineSettings(kv_cache_gib=0.25, prefix_caching=False))


def block(subject: Engine, routing: RoutingLog | None) -> float:
    """Seconds of a batch of requests, always the same; noted in `routing`, where there is one."""
    subject._routing = routing
    draw = random.Random(0)
    for number in range(SEQUENCES):
        prompt = [draw.randrange(subject.model.vocab_size) for _ in range(PROMPT)]
        params = SamplingParams(max_tokens=ANSWER, temperature=0.8, seed=number)
        subject.add(Submit(request_id=f"{number}", prompt_token_ids=prompt, params=params))
    started = time.perf_counter()
    while subject.has_work:
        subject.step()
    return time.perf_counter() - started


def settled(ratios: list[float]) -> tuple[float, float]:
    """The mean but for the tenth at either end, and its standard error."""
    tenth = len(ratios) // 10
    kept = sorted(ratios)[tenth : len(ratios) - tenth]
    return statistics.mean(kept), statistics.stdev(kept) / len(kept) ** 0.5


@contextlib.contextmanager
def fed(store: ExpertStore, packer: RoutingPacker, folder: Path) -> Iterator[None]:
    """The whole way of a gateway's load: observer, record and stream."""
    manifest, vocabulary = store.manifest, store.config().vocab_size
    layers, experts, top_k = tuple(manifest.moe_layers), manifest.num_experts, manifest.top_k
    shape = ModelShape(manifest.fingerprint, layers, experts, top_k, vocabulary)
    with RedisServer() as redis:
        hello = Hello(gateway="bench", shape=shape.to_json(), redis_url=redis.url, record=str(folder / "record"))
        feed = LoadFeed(packer, hello)
        feed.start()
        yield
        feed.close()


class Packer(RoutingPacker):
    """Packs while it is told to."""

    on = False

    def pack(self) -> RoutingChunk | None:
        """See `RoutingPacker`."""
        return super().pack() if self.on else None


def main() -> None:
    """Measure, print and keep the figures."""
    opts = options(__doc__ or "")
    store = ensure_store(DEFAULT_MODEL)
    with contextlib.suppress(NoCompilerError):
        compilation.compile_layers(store.path, cache_dir() / "compiled")
    routing = RoutingLog(store.manifest.moe_layers)
    subject = engine(store, routing)
    packer = Packer(routing, store.manifest.num_experts, subject.scheduler.token_budget)
    turns: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        with fed(store, packer, Path(folder)):
            for turn in range(_WARM + (16 if opts.quick else 100)):
                turns.append({mode: run(subject, routing, packer, mode) for mode in (*MODES, *MODES)[turn % 3 :][:3]})
        recorded = len(read_records(Path(folder) / "record"))
    ratios = {mode: settled([turn[mode] / turn["plain"] for turn in turns[_WARM:]]) for mode in MODES[1:]}
    for mode, (ratio, error) in ratios.items():
        print(f"{mode}: {ratio:.3f} +- {error:.3f} times the plain engine's time")
    print(f"{len(turns)} turns, {recorded} steps recorded, {routing.dropped} dropped")
    figure = f"recording: {ratios['told'][0]:.3f} times the time of a step without (bar {BAR})"
    finish("record", {"turns": turns}, figure, passed=ratios["told"][0] <= BAR, check=opts.check)


def run(subject: Engine, routing: RoutingLog, packer: Packer, mode: str) -> float:
    """Seconds of one batch; what is left of it to be told is not the next one's cost."""
    packer.on = mode == "told"
    seconds = block(subject, None if mode == "plain" else routing)
    if not packer.on:
        routing.take(1 << 30)
    while routing.waiting:
        time.sleep(0.05)
    time.sleep(_OBSERVER_S)
    return seconds


if __name__ == "__main__":
    main()
