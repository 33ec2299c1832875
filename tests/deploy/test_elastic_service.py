"""Experts that scale one by one: load moves, goes and comes back; replicas of real Serve follow; no token changes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.deploy.served import Served, serving
from tests.waiting import eventually

pytestmark = pytest.mark.ray

POLICY = """
experts:
  unit: {experts: 2}
  max_replicas: 2
  device: {kind: emulated, rows_per_s: 4000, weight_read_ms: 0.5}
  min_rows_per_replica: 1
predictor: {interval_s: 0.2, horizon_s: 1, train: false}
planner: {interval_s: 0.2, memory_mib: 27.1, idle_to_zero_s: 4, cool_down_s: 1}
"""
"""Memory for all 32 slices, and second copies of four."""

FIRST, SECOND = 3100, 93
"""Of a prompt that repeats either of these tokens, seven of eight rows go to experts 0-3, or seven to experts 4-7."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = Path(os.path.realpath(tmp_path_factory.mktemp("s")))
    (folder / "policy.yaml").write_text(POLICY)
    with serving(folder, "--policy", str(folder / "policy.yaml")) as running:
        yield running


@contextlib.contextmanager
def load(served: Served, token: int) -> Iterator[None]:
    """Prompts of one token, one after the other."""
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            served.client.completions.create(model="evermoe-tiny", prompt=[token] * 200, max_tokens=1)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def replicas(served: Served) -> list[int]:
    return [unit["ready"] for unit in served.status()["units"]]


def leads(served: Served, *, first: bool) -> bool:
    """Whether experts 0-3 have more replicas than experts 4-7, or the other way round."""
    counts = replicas(served)
    one, other = sum(counts[:2]), sum(counts[2:])
    return one > other if first else other > one


def test_replicas_follow_the_load_and_the_answer_stays_the_same(served: Served) -> None:
    expected = served.stream(200)
    texts: list[str] = []
    ended = threading.Event()

    def client() -> None:
        while not ended.is_set():
            texts.append(served.stream(200))

    streaming = threading.Thread(target=client)
    streaming.start()
    try:
        for token in (FIRST, SECOND, FIRST):
            with load(served, token):
                eventually(partial(leads, served, first=token == FIRST), 150, f"replicas follow token {token}")
    finally:
        ended.set()
        streaming.join()
    assert texts
    assert set(texts) == {expected}
    assert served.calls()["replica"] > 0


def test_idle_experts_go_to_zero_and_come_back_without_a_wait(served: Served) -> None:
    expected = served.stream(40)
    eventually(lambda: not any(replicas(served)), 90, "idle experts go")
    inline = served.calls()["inline"]
    assert served.stream(40) == expected
    assert served.calls()["inline"] > inline, "nobody waited for a replica"
    with load(served, FIRST):
        eventually(lambda: any(replicas(served)), 90, "they come back")
    assert served.stream(40) == expected
