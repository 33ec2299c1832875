"""What it costs an engine that its routing is watched, learned from and recorded.

The default model, every expert inline, decoder layers compiled; 16 prompts of 170 tokens at a time, 64 tokens out, with
and without in turn. Bar: at most 2 % of a step's time.   python -m bench.record
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
from gateway.routing_chunk import Hello
from gateway.routing_log import RoutingLog
from gateway.routing_packer import RoutingPacker
from predictor.records import read_records
from predictor.shape import ModelShape
from recovery.redis_server import RedisServer

BAR = 1.02
SEQUENCES, PROMPT, ANSWER = 16, 170, 64


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


def block(subject: Engine, seed: int) -> tuple[float, int]:
    """Seconds and steps of one batch of requests."""
    draw = random.Random(seed)
    for number in range(SEQUENCES):
        prompt = [draw.randrange(subject.model.vocab_size) for _ in range(PROMPT)]
        params = SamplingParams(max_tokens=ANSWER, temperature=0.8, seed=number)
        subject.add(Submit(request_id=f"{number}", prompt_token_ids=prompt, params=params))
    steps, started = 0, time.perf_counter()
    while subject.has_work:
        subject.step()
        steps += 1
    return time.perf_counter() - started, steps


@contextlib.contextmanager
def fed(store: ExpertStore, routing: RoutingLog, folder: Path) -> Iterator[None]:
    """The whole way of a gateway's load: observer, record and stream."""
    manifest = store.manifest
    shape = ModelShape(
        manifest.fingerprint,
        tuple(manifest.moe_layers),
        manifest.num_experts,
        manifest.top_k,
        store.config().vocab_size,
    )
    with RedisServer() as redis:
        hello = Hello(gateway="bench", shape=shape.to_json(), redis_url=redis.url, record=str(folder / "record"))
        feed = LoadFeed(RoutingPacker(routing, manifest.num_experts, 512), hello)
        feed.start()
        yield
        feed.close()


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
    plain, watched = engine(store, inline, None), engine(store, inline, routing)
    ratios, each = [], []
    with tempfile.TemporaryDirectory() as folder:
        with fed(store, routing, Path(folder)):
            for turn in range(2 + (36 if opts.quick else 120)):
                order = (plain, watched) if turn % 2 else (watched, plain)
                seconds = {}
                for subject in order:
                    seconds[subject], steps = block(subject, turn)
                    while routing.waiting:
                        time.sleep(0.05)  # what is left to be told is not the other one's cost
                if turn >= 2:
                    ratios.append(seconds[watched] / seconds[plain])
                    each.append(1000 * seconds[plain] / steps)
        recorded = len(read_records(Path(folder) / "record"))
    ratio = statistics.median(ratios)
    print(f"a step takes {statistics.median(each):.2f} ms; {recorded} steps recorded, {routing.dropped} dropped")
    print(f"{len(ratios)} turns, quartiles {', '.join(f'{q:.3f}' for q in statistics.quantiles(ratios))}")
    figure = f"recording: {ratio:.3f}x the time of a step without (bar {BAR}x), {os.cpu_count()} cores"
    raw = {"ratios": ratios, "step_ms": each, "dropped": routing.dropped}
    finish("record", raw, figure, passed=ratio <= BAR, check=opts.check)


if __name__ == "__main__":
    main()
