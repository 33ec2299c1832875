"""The observer beside a gateway: a real process that records and streams, and that nobody waits for."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from experts.families import moe_modules
from gateway import load_feed
from gateway.engine import Engine, EngineSettings
from gateway.load_feed import LoadFeed
from gateway.look_ahead import Gates
from gateway.model import load_model
from gateway.routing_chunk import Hello
from gateway.routing_log import RoutingLog
from gateway.routing_packer import RoutingPacker
from predictor.records import Records, read_records
from predictor.shape import ModelShape
from recovery import load_stream
from recovery.directory import Directory
from tests.gateway.inline_model import InlineFamily, drain, prompts, single_threaded, submit
from tests.waiting import eventually

BUDGET = 16


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_threaded():
        yield


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> InlineFamily:
    return InlineFamily("qwen3_moe", tmp_path_factory.mktemp("feed"))


class Told:
    """An engine that tells its load."""

    def __init__(self, family: InlineFamily, hello: Callable[[ModelShape], Hello]) -> None:
        manifest = family.store.manifest
        self.log = RoutingLog(manifest.moe_layers)
        model = load_model(family.store, experts=self.log.watch(family.experts))
        self.log.gates = Gates(model.network, moe_modules(model.network), manifest.top_k)
        settings = EngineSettings(kv_cache_gib=0.001, block_size=4, token_budget=BUDGET, max_sequences=4)
        self.engine = Engine(model, settings, routing=self.log)
        layers, experts, top_k = tuple(manifest.moe_layers), manifest.num_experts, manifest.top_k
        self.shape = ModelShape(manifest.fingerprint, layers, experts, top_k, model.vocab_size)
        self.feed = LoadFeed(RoutingPacker(self.log, experts, BUDGET, 4), hello(self.shape))
        self.steps = 0

    def answer(self, name: str = "one") -> None:
        def count() -> None:
            self.steps += 1

        self.engine.add(submit(name, prompts(20)[0], max_tokens=8))
        drain(self.engine, count)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.feed.start()
        try:
            yield
        finally:
            self.feed.close()


def observers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if "gateway.load_observer" in " ".join(child.cmdline())]


def received(directory: Directory) -> list[Records]:
    return [message.records() for message in load_stream.receive(directory, "0", 0.01)[0]]


def test_every_step_is_recorded(family: InlineFamily, tmp_path: Path) -> None:
    file = tmp_path / "record"
    told = Told(family, lambda shape: Hello(gateway="g", shape=shape.to_json(), record=str(file)))
    with told.running():
        told.answer()
        told.answer("two")
    found = read_records(file, told.shape)
    assert len(found) == told.steps
    assert found.prefill_rows.sum() == 20 + 4  # the second finds what the first left: four blocks of four
    assert found.look_ahead[:, 1:].any()
    assert (np.diff(found.time_s) > 0).all()
    assert observers() == []


def test_load_is_streamed_while_the_engine_runs(
    family: InlineFamily, redis_url: str, request: pytest.FixtureRequest
) -> None:
    directory = Directory(redis_url, request.node.name)

    def hello(shape: ModelShape) -> Hello:
        return Hello(gateway="g", shape=shape.to_json(), redis_url=redis_url, namespace=request.node.name)

    told = Told(family, hello)
    with told.running():
        told.answer()
        eventually(lambda: sum(map(len, received(directory))) == told.steps, 30, "all steps are in the stream")


def test_without_redis_the_record_is_complete(family: InlineFamily, tmp_path: Path) -> None:
    file = tmp_path / "record"

    def hello(shape: ModelShape) -> Hello:
        nowhere = f"unix://{tmp_path}/nobody.sock"
        return Hello(gateway="g", shape=shape.to_json(), redis_url=nowhere, namespace="n", record=str(file))

    told = Told(family, hello)
    with told.running():
        told.answer()
    assert len(read_records(file)) == told.steps


def test_an_observer_that_is_killed_is_replaced_and_the_engine_goes_on(
    family: InlineFamily, redis_url: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_feed, "_AGAIN_S", 0.05)
    directory = Directory(redis_url, request.node.name)

    def hello(shape: ModelShape) -> Hello:
        return Hello(gateway="g", shape=shape.to_json(), redis_url=redis_url, namespace=request.node.name)

    told = Told(family, hello)
    with told.running():
        told.answer("0")
        eventually(lambda: bool(received(directory)), 30, "the load is streamed")
        [victim] = observers()
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait(10)
        before, number = len(received(directory)), 0

        def heard_again() -> bool:
            nonlocal number
            number += 1
            told.answer(str(number))
            return len(received(directory)) > before

        eventually(heard_again, 30, "another observer streams")


def test_an_observer_that_hangs_costs_the_engine_nothing(
    family: InlineFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.routing_log._MOST_STEPS", 20)
    monkeypatch.setattr(load_feed, "_END_S", 0.2)
    told = Told(family, lambda shape: Hello(gateway="g", shape=shape.to_json(), record=str(tmp_path / "record")))
    with told.running():
        eventually(lambda: len(observers()) == 1, 10, "it runs")
        os.kill(observers()[0].pid, signal.SIGSTOP)
        for number in range(200):
            told.answer(str(number))
            if told.log.dropped:
                break
        assert told.log.dropped > 0
    assert observers() == []
