"""What it costs an engine that its routing is watched, learned from and recorded.

The default model, every expert inline, decoder layers compiled; the same 16 prompts of 170 tokens, 64 tokens out, with
and without in turn. Each step is compared with itself, by medians over the turns; what the feed's thread computes is
charged as if the engine had waited for all of it. Bar: at most 2 % of a step's time.   python -m bench.record
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import tempfile
import threading
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
from gateway.routing_chunk import Hello
from gateway.routing_log import RoutingLog
from gateway.routing_packer import RoutingPacker
from predictor.records import read_records
from predictor.shape import ModelShape
from recovery.redis_server import RedisServer

BAR = 1.02
SEQUENCES, PROMPT, ANSWER = 16, 170, 64
_WARM = 2


def engine(store: ExpertStore, inline: ExpertFFN, routing: RoutingLog | None) -> Engine:
    """An engine of its own, watched by `routing` where there is one."""
    manifest = store.manifest
    dispatcher = Dispatcher(NoFleet(), inline, manifest.num_experts, 32, 1.0)
    model = load_model(store, experts=dispatcher if routing is None else routing.watch(dispatcher))
    compilation.adopt(model, cache_dir() / "compiled")
    model.threads = os.cpu_count()
    if routing is not None:
        routing.gates = Gates(model.network, moe_modules(model.network), manifest.top_k)
    settings = EngineSettings(kv_cache_gib=0.25, prefix_caching=False)
    return Engine(model, settings, routing=routing)


def block(subject: Engine) -> list[float]:
    """Seconds of each step of a batch of requests, always the same."""
    draw = random.Random(0)
    for number in range(SEQUENCES):
        prompt = [draw.randrange(subject.model.vocab_size) for _ in range(PROMPT)]
        params = SamplingParams(max_tokens=ANSWER, temperature=0.8, seed=number)
        subject.add(Submit(request_id=f"{number}", prompt_token_ids=prompt, params=params))
    seconds = []
    while subject.has_work:
        started = time.perf_counter()
        subject.step()
        seconds.append(time.perf_counter() - started)
    return seconds


def typical(blocks: list[list[float]]) -> float:
    """Seconds of a block whose every step takes its median."""
    return float(sum(statistics.median(step) for step in zip(*blocks, strict=True)))


@contextlib.contextmanager
def fed(store: ExpertStore, routing: RoutingLog, folder: Path) -> Iterator[None]:
    """The whole way of a gateway's load: observer, record and stream."""
    manifest, vocabulary = store.manifest, store.config().vocab_size
    shape = ModelShape(
        manifest.fingerprint, tuple(manifest.moe_layers), manifest.num_experts, manifest.top_k, vocabulary
    )
    with RedisServer() as redis:
        hello = Hello(gateway="bench", shape=shape.to_json(), redis_url=redis.url, record=str(folder / "record"))
        feed = LoadFeed(RoutingPacker(routing, manifest.num_experts, 512), hello)
        feed.start()
        yield
        feed.close()


def feed_seconds() -> float:
    """Processor time of the feed's thread so far."""
    [thread] = [thread for thread in threading.enumerate() if thread.name == "load-feed"]
    assert thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def main() -> None:
    """Measure, print and keep the figures."""
    opts = options(__doc__ or "")
    store = ensure_store(DEFAULT_MODEL)
    with contextlib.suppress(NoCompilerError):
        compilation.compile_layers(store.path, cache_dir() / "compiled")
    kernels.load(cache_dir() / "compiled")
    inline = ExpertFFN(store, fast=True)
    for expert in range(store.manifest.num_experts):
        inline.load(expert)
    routing = RoutingLog(store.manifest.moe_layers)
    subjects = {"plain": engine(store, inline, None), "watched": engine(store, inline, routing)}
    blocks: dict[str, list[list[float]]] = {name: [] for name in subjects}
    with tempfile.TemporaryDirectory() as folder:
        with fed(store, routing, Path(folder)):
            for turn in range(_WARM + (36 if opts.quick else 120)):
                if turn == _WARM:
                    before = feed_seconds()
                for name in sorted(subjects, reverse=turn % 2 == 0):
                    seconds = block(subjects[name])
                    while routing.waiting:
                        time.sleep(0.05)  # what is left to be told is not the other one's cost
                    if turn >= _WARM:
                        blocks[name].append(seconds)
            background = (feed_seconds() - before) / len(blocks["watched"])
        recorded = len(read_records(Path(folder) / "record"))
    plain, watched, steps = typical(blocks["plain"]), typical(blocks["watched"]), len(blocks["plain"][0])
    ratio = (watched + background) / plain
    each = 1000 / steps
    print(f"{len(blocks['plain'])} turns of {steps} steps; {recorded} steps recorded, {routing.dropped} dropped")
    print(
        f"ms a step: {plain * each:.3f} without, {watched * each:.3f} with, the feed beside it {background * each:.3f}"
    )
    figure = f"recording: {ratio:.3f}x the time of a step without (bar {BAR}x)"
    raw = {"ms": {"plain": plain * each, "watched": watched * each, "feed": background * each}}
    finish("record", {**raw, "dropped": routing.dropped}, figure, passed=ratio <= BAR, check=opts.check)


if __name__ == "__main__":
    main()
