"""Every row is combined exactly once, whatever replicas do and in whatever order: over real sockets."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.wire.frame import Segment
from experts.wire.server import ExpertServer, NotServedError
from recovery.directory import Directory
from recovery.redis_server import RedisServer
from tests.gateway.test_dispatch import EXPERTS, Cluster, Slices
from tests.waiting import eventually

DEADLINE_S = 0.05
REPLICAS = ((0, 1, 2, 3), (2, 3, 4), (1, 3, 4, 0))
"""Experts of each; nobody serves the last one."""
DEEDS = ("answer", "refuse", "break", "die", "half", "late", "tardy")


class Actor:
    """A replica that does what its script says, call by call, and then answers."""

    def __init__(self) -> None:
        self.script: list[str] = []
        self.server: ExpertServer | None = None
        self.dead = False
        self._slices = Slices()

    def compute(self, layer: int, segments: Sequence[Segment], rows: torch.Tensor, out: torch.Tensor) -> None:
        deed = self.script.pop(0) if self.script else "answer"
        if deed == "refuse":
            raise NotServedError("not here")
        if deed == "break":
            raise RuntimeError("broken")
        if deed in ("half", "late", "die"):
            out[: max(len(out) // 2, 1)] = float("nan")
        if deed in ("half", "die"):
            self.dead = True
            assert self.server is not None
            threading.Thread(target=self.server.close).start()
            threading.Event().wait(0.1)
        if deed in ("late", "tardy"):
            threading.Event().wait(3 * DEADLINE_S if deed == "late" else DEADLINE_S)
        if deed == "late":
            out.fill_(float("nan"))
            return
        self._slices.compute(layer, segments, rows, out)


class Troupe:
    """A cluster in which every replica is alive when a scene begins."""

    def __init__(self, directory: Directory) -> None:
        self.cluster = Cluster(directory, deadline_s=DEADLINE_S, min_rows=2)
        self._numbers = itertools.count()
        self.actors: list[Actor] = []

    def gather(self) -> None:
        alive = [actor for actor in self.actors if not actor.dead] if self.actors else []
        if len(alive) < len(self.actors) or not self.actors:
            self.actors = [actor if not actor.dead else Actor() for actor in self.actors or [Actor() for _ in REPLICAS]]
        for actor, experts in zip(self.actors, REPLICAS, strict=True):
            actor.script = []
            if actor.server is None:
                actor.server = self.cluster.add(f"r{next(self._numbers)}", experts, actor.compute)

        def connected() -> bool:
            self.cluster.fleet._refresh()
            listed = [link.entry.addresses for link in self.cluster.fleet.table.links.values()]
            return all(actor.server is not None and actor.server.addresses in listed for actor in self.actors)

        eventually(connected)


@pytest.fixture(scope="module")
def troupe() -> Iterator[Troupe]:
    with RedisServer() as server:
        troupe = Troupe(Directory(server.url, "faults"))
        with troupe.cluster.exits:
            yield troupe


@settings(max_examples=40, deadline=None)
@given(
    scripts=st.tuples(*[st.lists(st.sampled_from(DEEDS), max_size=3)] * len(REPLICAS)),
    tokens=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    top_k=st.integers(1, EXPERTS),
)
def test_any_interleaving_of_answers_refusals_deaths_and_hangs_gives_the_plain_sum(
    troupe: Troupe, scripts: tuple[list[str], ...], tokens: list[int], top_k: int
) -> None:
    troupe.gather()
    for actor, script in zip(troupe.actors, scripts, strict=True):
        actor.script = list(script)
    for seed, rows in enumerate(tokens):
        troupe.cluster.check(rows, top_k, seed=seed)
