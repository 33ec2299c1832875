"""Dispatch: rows go to replicas or inline, replicas fail in every way, and the answer does not change."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts import kernels
from experts.wire.frame import Segment
from experts.wire.server import ExpertServer, NotServedError
from experts.wire.sockets import host_id
from gateway.dispatch import Dispatcher, NoReplicaError
from gateway.fleet import Fleet
from gateway.inline_choice import InlineChoice
from placement.cost import Speed
from recovery.directory import Directory, ReplicaEntry
from recovery.lease import Lease
from recovery.redis_server import RedisServer
from tests.waiting import eventually

EXPERTS, WIDTH, SECRET_NAMESPACE, MODEL = 6, 16, "dispatch", "fingerprint"


def expert(layer: int, number: int, rows: torch.Tensor) -> torch.Tensor:
    """What slice (layer, number) answers; not linear, so a row in the wrong place shows."""
    return torch.sin(rows * (number + 1)) + layer


class Slices:
    """The arithmetic of `ExpertFFN` with the function above; counts what it computes."""

    def __init__(self) -> None:
        self.rows = 0

    def mixture(self, *_: object) -> None:
        """Never in one call."""

    def compute(self, layer: int, segments: Sequence[Segment], rows: torch.Tensor, out: torch.Tensor) -> None:
        start = 0
        for number, count in segments:
            out[start : start + count] = expert(layer, number, rows[start : start + count])
            start += count
        self.rows += start


class Cluster:
    """Replicas as threads with real sockets and leases, and the dispatcher of one gateway."""

    def __init__(self, directory: Directory, deadline_s: float = 5.0, min_rows: int = 1) -> None:
        self.directory = directory
        self.exits = contextlib.ExitStack()
        self.inline = Slices()
        self.fleet = self.exits.enter_context(Fleet(directory, directory.secret(), MODEL))
        self.dispatcher = Dispatcher(self.fleet, self.inline, EXPERTS, min_rows, deadline_s)
        self.exits.callback(self.dispatcher.close)

    def add(
        self, name: str, experts: Sequence[int], compute: Callable[..., None] | None = None, *, tcp: bool = False
    ) -> ExpertServer:
        server = self.exits.enter_context(
            ExpertServer(compute or Slices().compute, self.directory.secret(), MODEL, tcp_host="127.0.0.1")
        )
        host = "elsewhere" if tcp else host_id()
        entry = ReplicaEntry(
            id=name, unit=name, pid=0, node="n", host=host, addresses=server.addresses, experts=list(experts),
            layers=[0, 1, 2], fingerprint=MODEL, slices=[(layer, e) for e in experts for layer in range(3)],
        )  # fmt: skip
        self.exits.enter_context(Lease(self.directory, entry))
        eventually(lambda: name in self.fleet.table.links)
        return server

    def check(self, tokens: int = 5, top_k: int = 2, layer: int = 1, seed: int = 0) -> None:
        """Dispatch random rows and compare with the plain sum over top-k."""
        random = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, WIDTH, generator=random)
        index = torch.rand(tokens, EXPERTS, generator=random).topk(top_k).indices
        weights = torch.rand(tokens, top_k, generator=random)
        expected = torch.stack(
            [sum(w * expert(layer, int(e), x) for e, w in zip(es, ws, strict=True))
             for x, es, ws in zip(hidden, index, weights, strict=True)]
        )  # fmt: skip
        torch.testing.assert_close(self.dispatcher(layer, hidden, index, weights), expected)

    def calls(self, path: str) -> int:
        return sum(count for (_, _, taken), count in self.dispatcher.calls.items() if taken == path)


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture(params=["compiled", "python"], autouse=True, scope="module")
def way(request: pytest.FixtureRequest, compiled_folder: Path) -> Iterator[None]:
    """Everything holds with the compiled exchange and without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_loaded", False)
        if request.param == "compiled":
            assert kernels.load(compiled_folder)
        yield


@pytest.fixture
def make(redis: RedisServer, request: pytest.FixtureRequest) -> Iterator[Callable[..., Cluster]]:
    with contextlib.ExitStack() as exits:

        def build(**options: float) -> Cluster:
            cluster = Cluster(Directory(redis.url, request.node.name), **options)  # type: ignore[arg-type]
            exits.callback(cluster.exits.close)
            return cluster

        yield build


def test_without_replicas_everything_runs_inline(make: Callable[..., Cluster]) -> None:
    cluster = make()
    cluster.check()
    assert cluster.calls("inline") > 0
    assert cluster.calls("replica") == 0


@pytest.mark.parametrize("tcp", [False, True], ids=["shared-memory", "tcp"])
def test_with_replicas_nothing_runs_inline(make: Callable[..., Cluster], tcp: bool) -> None:
    cluster = make()
    cluster.add("a", [0, 1, 2], tcp=tcp)
    cluster.add("b", [3, 4, 5], tcp=tcp)
    for seed in range(5):
        cluster.check(tokens=33, seed=seed)
    assert cluster.inline.rows == 0


def test_inline_and_replicas_share_a_layer(make: Callable[..., Cluster]) -> None:
    cluster = make()
    cluster.add("a", [0, 3])
    cluster.check(tokens=40)
    assert cluster.calls("inline") == 4
    assert cluster.calls("replica") == 2


def test_rows_of_one_expert_are_split_over_its_replicas(make: Callable[..., Cluster]) -> None:
    cluster = make(min_rows=2)
    slices = [Slices(), Slices()]
    for name, mine in zip("ab", slices, strict=True):
        cluster.add(name, range(EXPERTS), mine.compute)
    cluster.check(tokens=40)
    assert cluster.calls("replica") == 2 * EXPERTS
    assert sum(mine.rows for mine in slices) == 80
    assert all(mine.rows >= 30 for mine in slices)


def test_one_row_and_many_rows(make: Callable[..., Cluster]) -> None:
    cluster = make()
    cluster.add("a", range(EXPERTS))
    for tokens in (1, 2, 700, 3):
        cluster.check(tokens=tokens)


def test_half_precision_rows_are_summed_in_fp32(make: Callable[..., Cluster]) -> None:
    cluster = make()
    cluster.add("a", range(EXPERTS))
    hidden = torch.randn(4, WIDTH, dtype=torch.bfloat16)
    index, weights = torch.tensor([[0, 1]] * 4), torch.tensor([[1.0, 1.0]] * 4)
    each = [expert(0, number, hidden) for number in (0, 1)]
    expected = (each[0].float() + each[1].float()).bfloat16()
    assert torch.equal(cluster.dispatcher(0, hidden, index, weights), expected)


def test_a_replica_that_is_gone_costs_its_rows_one_more_call(make: Callable[..., Cluster]) -> None:
    cluster = make()
    doomed = cluster.add("a", range(EXPERTS))
    cluster.add("b", range(EXPERTS))
    cluster.check(tokens=20)
    doomed.close()
    for seed in range(4):
        cluster.check(tokens=20, seed=seed)
    assert cluster.calls("retry") > 0
    assert cluster.inline.rows == 0


def test_the_last_replica_gone_means_inline(make: Callable[..., Cluster]) -> None:
    cluster = make()
    doomed = cluster.add("a", range(EXPERTS))
    cluster.check()
    doomed.close()
    cluster.check()
    assert cluster.inline.rows > 0


def test_a_replica_that_dies_in_the_middle_of_a_call_changes_nothing(make: Callable[..., Cluster]) -> None:
    cluster = make()
    servers: list[ExpertServer] = []

    def die(*_: object) -> None:
        threading.Thread(target=servers[0].close).start()
        threading.Event().wait(0.2)
        raise RuntimeError("killed")

    servers.append(cluster.add("a", [0, 1, 2], die))
    cluster.add("b", [3, 4, 5])
    cluster.check(tokens=30)
    assert cluster.calls("inline") == 3


def test_a_replica_that_hangs_is_given_up_and_may_not_write_later(make: Callable[..., Cluster]) -> None:
    cluster = make(deadline_s=0.2)
    woken = threading.Event()
    done = threading.Event()

    def hang(layer: int, segments: Sequence[Segment], rows: torch.Tensor, out: torch.Tensor) -> None:
        woken.wait(10.0)
        out.fill_(float("nan"))
        done.set()

    cluster.add("a", range(EXPERTS), hang)
    started = time.monotonic()
    cluster.check(tokens=20)
    assert time.monotonic() - started < 5.0
    woken.set()
    assert done.wait(10.0)
    cluster.check(tokens=20)


def test_a_replica_that_refuses_is_not_asked_again_for_this_layer(make: Callable[..., Cluster]) -> None:
    cluster = make()

    def refuse(*_: object) -> None:
        raise NotServedError("not here")

    cluster.add("a", range(EXPERTS), refuse)
    cluster.check()
    assert cluster.calls("inline") > 0


def test_a_replica_that_comes_back_is_used_again(make: Callable[..., Cluster]) -> None:
    cluster = make()
    cluster.add("a", range(EXPERTS)).close()
    cluster.check()
    cluster.add("again", range(EXPERTS))
    before = cluster.inline.rows
    eventually(lambda: "a" not in cluster.fleet.table.links)
    cluster.check()
    assert cluster.inline.rows == before


def test_a_replica_of_another_model_never_joins(make: Callable[..., Cluster]) -> None:
    cluster = make()
    directory = cluster.directory
    with ExpertServer(Slices().compute, directory.secret(), "another model") as stranger:
        entry = ReplicaEntry(
            id="stranger", unit="expert-0", pid=0, node="n", host=host_id(), addresses=stranger.addresses,
            experts=list(range(EXPERTS)), layers=[0, 1, 2], fingerprint="another model",
        )  # fmt: skip
        with Lease(directory, entry):
            cluster.add("a", [0])  # listed later, connected: so the stranger has been tried
            cluster.check()
            assert "stranger" not in cluster.fleet.table.links


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 60),
    top_k=st.integers(1, EXPERTS),
    layer=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_any_batch_gives_the_plain_sum(
    property_cluster: Cluster, tokens: int, top_k: int, layer: int, seed: int
) -> None:
    property_cluster.check(tokens, top_k, layer, seed)


@pytest.fixture(scope="module")
def property_cluster(redis: RedisServer) -> Iterator[Cluster]:
    cluster = Cluster(Directory(redis.url, "property"), min_rows=3)
    with cluster.exits:
        cluster.add("a", [0, 1, 2])
        cluster.add("b", [1, 2, 3])
        cluster.add("c", [2, 3], tcp=True)
        yield cluster


def test_with_prefer_rows_stay_here_though_replicas_serve_them(make: Callable[..., Cluster]) -> None:
    cluster = make()
    cluster.dispatcher = Dispatcher(
        cluster.fleet, cluster.inline, EXPERTS, 1, 5.0, choice=InlineChoice(Speed(1e-9, 1e-12))
    )  # fmt: skip
    cluster.add("all", range(EXPERTS))
    cluster.check()
    assert cluster.calls("inline")
    assert not cluster.calls("replica")


def test_with_prefer_replicas_get_what_they_do_faster(make: Callable[..., Cluster]) -> None:
    cluster = make()
    cluster.dispatcher = Dispatcher(
        cluster.fleet, cluster.inline, EXPERTS, 1, 5.0, choice=InlineChoice(Speed(1.0, 1.0))
    )  # fmt: skip
    cluster.exits.callback(cluster.dispatcher.close)
    for number in range(EXPERTS):
        cluster.add(str(number), [number])
    cluster.check()
    assert cluster.calls("replica")
    assert not cluster.calls("inline")


def test_with_never_a_step_waits_for_a_replica(make: Callable[..., Cluster]) -> None:
    cluster = make()
    cluster.dispatcher = Dispatcher(
        cluster.fleet, cluster.inline, EXPERTS, 1, 5.0, may_inline=False
    )  # fmt: skip
    cluster.exits.callback(cluster.dispatcher.close)
    step = threading.Thread(target=cluster.check)
    step.start()
    step.join(0.3)
    assert step.is_alive()
    cluster.add("all", range(EXPERTS))
    step.join(10)
    assert not step.is_alive()
    assert cluster.inline.rows == 0
    assert cluster.calls("replica")


def test_with_never_a_step_that_waits_fails_when_the_gateway_ends(make: Callable[..., Cluster]) -> None:
    cluster = make()
    dispatcher = Dispatcher(cluster.fleet, cluster.inline, EXPERTS, 1, 5.0, may_inline=False)
    ending = threading.Timer(0.2, dispatcher.stop_waiting)
    ending.start()
    with pytest.raises(NoReplicaError, match="has no replica"):
        dispatcher(1, torch.ones(1, WIDTH), torch.tensor([[0, 1]]), torch.ones(1, 2))
    ending.join()


def test_other_settings_count_from_the_next_layer_on(make: Callable[..., Cluster]) -> None:
    cluster = make()
    cluster.add("a", range(EXPERTS))
    cluster.check()
    other = Slices()
    cluster.dispatcher.use(other, 1, 5.0, choice=None, may_inline=True)
    for link in list(cluster.fleet.table.links.values()):
        cluster.fleet.drop(link, "test")
    cluster.check(seed=1)
    assert (cluster.inline.rows, other.rows > 0) == (0, True)


def test_a_step_that_waits_for_replicas_goes_on_when_the_gateway_may_compute(make: Callable[..., Cluster]) -> None:
    cluster = make()
    cluster.dispatcher.use(cluster.inline, 1, 5.0, choice=None, may_inline=False)
    waiting = threading.Thread(target=cluster.check)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    cluster.dispatcher.use(cluster.inline, 1, 5.0, choice=None, may_inline=True)
    waiting.join(10)
    assert not waiting.is_alive()
