"""What it costs an engine that its routing is watched, learned from, recorded and streamed.

The default model, every expert inline, decoder layers compiled; the same 16 prompts of 170 tokens, 64 tokens out, on
one engine with and without in turn, with everything that follows beside it. Bar: at most 2 % of the time (the mean of
the turns' ratios but for the tenth at either end).   python -m bench.record
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
_WARM = 2


def engine(store: ExpertStore, routing: RoutingLog) -> Engine:
    """A gateway's engine, which `routing` can watch."""
    kernels.load(cache_dir() / "compiled")
    inline = ExpertFFN(store, fast=True)
    for expert in range(store.manifest.num_experts):
        inline.load(expert)
    manifest = store.manifest
    dispatcher = Dispatcher(NoFleet(), inline, manifest.num_experts, 32, 1.0)
    model = load_model(store, experts=routing.watch(dispatcher))
    compilation.adopt(model, cache_dir() / "compiled")
    model.threads = os.cpu_count()
    routing.gates = Gates(model.network, moe_modules(model.network), manifest.top_k)
    return Engine(model, EngineSettings(kv_cache_gib=0.25, prefix_caching=False))


def block(subject: Engine, routing: RoutingLog | None) -> tuple[float, int]:
    """Seconds and steps of a batch of requests, always the same; noted in `routing`, where there is one."""
    subject._routing = routing
    draw = random.Random(0)
    for number in range(SEQUENCES):
        prompt = [draw.randrange(subject.model.vocab_size) for _ in range(PROMPT)]
        params = SamplingParams(max_tokens=ANSWER, temperature=0.8, seed=number)
        subject.add(Submit(request_id=f"{number}", prompt_token_ids=prompt, params=params))
    steps, started = 0, time.perf_counter()
    while subject.has_work:
        subject.step()
        steps += 1
    return time.perf_counter() - started, steps


def settled(ratios: list[float]) -> tuple[float, float]:
    """The mean but for the tenth at either end, and its standard error."""
    tenth = len(ratios) // 10
    kept = sorted(ratios)[tenth : len(ratios) - tenth]
    return statistics.mean(kept), statistics.stdev(kept) / len(kept) ** 0.5


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


def main() -> None:
    """Measure, print and keep the figures."""
    opts = options(__doc__ or "")
    store = ensure_store(DEFAULT_MODEL)
    with contextlib.suppress(NoCompilerError):
        compilation.compile_layers(store.path, cache_dir() / "compiled")
    routing = RoutingLog(store.manifest.moe_layers)
    subject = engine(store, routing)
    ratios, each = [], []
    with tempfile.TemporaryDirectory() as folder:
        with fed(store, routing, Path(folder)):
            for turn in range(_WARM + (40 if opts.quick else 160)):
                seconds = {}
                for watched in (True, False) if turn % 2 else (False, True):
                    seconds[watched], steps = block(subject, routing if watched else None)
                    while routing.waiting:
                        time.sleep(0.05)  # what is left to be told is not the other one's cost
                if turn >= _WARM:
                    ratios.append(seconds[True] / seconds[False])
                    each.append(1000 * seconds[False] / steps)
        recorded = len(read_records(Path(folder) / "record"))
    ratio, error = settled(ratios)
    print(f"{len(ratios)} turns of {steps} steps of {statistics.median(each):.2f} ms; {recorded} steps recorded, "
          f"{routing.dropped} dropped")  # fmt: skip
    figure = f"recording: {ratio:.3f} +- {error:.3f} times the time of a step without (bar {BAR})"
    finish("record", {"ratios": ratios, "step_ms": each}, figure, passed=ratio <= BAR, check=opts.check)


if __name__ == "__main__":
    main()
