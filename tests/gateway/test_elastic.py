"""Replicas that obey a plan, a gateway that follows it, on real sockets and a real Redis; the answer never changes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from experts import kernels
from experts.ffn import ExpertFFN
from experts.replica import Replica
from experts.store import ExpertStore, prepare
from experts.wire.frame import Segment
from gateway.dispatch import Dispatcher
from gateway.fleet import Fleet
from gateway.inline_experts import InlineExperts
from placement import plan
from placement.plan import Copy, Plan
from placement.policy import DevicePolicy, ExpertPolicy
from placement.unit import Unit
from recovery.directory import Directory, ReplicaEntry
from tests.checkpoints import write_checkpoint
from tests.waiting import eventually

TOP_K = 2


class Noted(Replica):
    """A replica that notes when it computed what."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.name: str = options["name"]
        self.seen: list[tuple[float, int, tuple[Segment, ...]]] = []
        super().__init__(*args, **options)

    def compute(self, layer: int, segments: Sequence[Segment], rows: torch.Tensor, out: torch.Tensor) -> None:
        self.seen.append((time.monotonic(), layer, tuple(segments)))
        super().compute(layer, segments, rows, out)

    def rows(self) -> int:
        return sum(count for _, _, segments in self.seen for _, count in segments)


class House:
    """One gateway's dispatcher, and replicas of one unit with all experts."""

    def __init__(self, store: ExpertStore, directory: Directory) -> None:
        self.store, self.directory = store, directory
        self.exits = contextlib.ExitStack()
        self.fleet = self.exits.enter_context(Fleet(directory, directory.secret(), store.manifest.fingerprint))
        self.inline = InlineExperts(ExpertFFN(store))
        self.dispatcher = Dispatcher(self.fleet, self.inline, store.manifest.num_experts, 1, 5.0)
        self.exits.callback(self.dispatcher.close)
        self.epoch = 0
        self._reference = ExpertFFN(store)

    def add(self, name: str, policy: ExpertPolicy | None = None) -> Noted:
        layers, experts = self.store.manifest.moe_layers, range(self.store.manifest.num_experts)
        replica = Noted(
            Unit("all", tuple(experts), tuple(layers)), self.store.path, policy or ExpertPolicy(), self.directory,
            name=name, node="n", node_ip="127.0.0.1",
        )  # fmt: skip
        self.exits.callback(replica.close)
        eventually(lambda: name in self.fleet.table.links)
        return replica

    def publish(self, copies: dict[str, dict[tuple[int, int], float]] | None) -> float:
        """Publish a plan; the seconds until the gateway follows it."""
        self.epoch += 1
        given = None if copies is None else {
            name: [Copy(layer, expert, share) for (layer, expert), share in held.items()]
            for name, held in copies.items()
        }  # fmt: skip
        wanted = Plan(epoch=self.epoch, replicas={}, copies=given, reason="test")
        started = time.monotonic()
        self.directory.publish(plan.DOCUMENT, plan.encode(wanted))
        while self.fleet.table.epoch != self.epoch:
            assert time.monotonic() < started + 10
            time.sleep(0.0005)
        return time.monotonic() - started

    def entry(self, name: str) -> ReplicaEntry | None:
        return next((entry for entry in self.directory.replicas() if entry.id == name), None)

    def figure(self, name: str, field: str) -> Any:
        """What an entry says; None without one."""
        return getattr(self.entry(name), field, None)

    def resident(self, name: str) -> set[tuple[int, int]]:
        return set(self.fleet.table.links[name].entry.slices)

    def check(self, tokens: int = 6, layer: int = 0, seed: int = 0) -> None:
        """Dispatch random rows and compare with the plain sum over top-k."""
        random = torch.Generator().manual_seed(seed)
        manifest = self.store.manifest
        hidden = torch.randn(tokens, manifest.hidden_size, generator=random)
        index = torch.rand(tokens, manifest.num_experts, generator=random).topk(TOP_K).indices
        weights = torch.rand(tokens, TOP_K, generator=random)
        expected = torch.stack(
            [sum((w * self._reference(layer, int(e), x[None])[0] for e, w in zip(es, ws, strict=True)),
                 torch.zeros(manifest.hidden_size)) for x, es, ws in zip(hidden, index, weights, strict=True)]
        )  # fmt: skip
        torch.testing.assert_close(self.dispatcher(layer, hidden, index, weights), expected)

    def calls(self, path: str) -> int:
        return sum(count for (_, _, taken), count in self.dispatcher.calls.items() if taken == path)

    def forget(self) -> None:
        """Let go of the reference's own experts."""
        self._reference.unload(self._reference.loaded)

    @contextlib.contextmanager
    def busy(self) -> Iterator[list[float]]:
        """Rows are dispatched all the time; when each layer ended."""
        ended: list[float] = []
        failures: list[BaseException] = []
        stop = threading.Event()

        def run() -> None:
            try:
                while not stop.is_set():
                    self.check(seed=len(ended) % 7, layer=self.store.manifest.moe_layers[len(ended) % 2])
                    ended.append(time.monotonic())
            except BaseException as failure:
                failures.append(failure)

        engine = threading.Thread(target=run)
        engine.start()
        try:
            eventually(lambda: len(ended) > 3)
            yield ended
        finally:
            stop.set()
            engine.join()
        assert failures == []


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    folder = tmp_path_factory.mktemp("mixtral")
    return prepare(write_checkpoint("mixtral", folder / "checkpoint"), folder / "store")


@pytest.fixture
def house(store: ExpertStore, redis_url: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    made = House(store, Directory(redis_url, request.node.name))
    with made.exits:
        yield made


@pytest.fixture
def everything(store: ExpertStore) -> dict[tuple[int, int], float]:
    return dict.fromkeys(store.slices, 1.0)


def wait_until_alone(house: House, name: str) -> None:
    def alone() -> bool:
        holders = [house.fleet.table.holders(*slice_).replicas for slice_ in house.store.slices]
        return all([link.entry.id for link in links] == [name] for links in holders)

    eventually(alone)


def wait_for(ended: list[float], layers: int) -> None:
    eventually(lambda: len(ended) >= layers)


SLOW = ExpertPolicy(device=DevicePolicy(kind="emulated", rows_per_s=1e6, weight_read_ms=2.0))


def test_a_plan_says_which_replica_holds_and_runs_what(house: House, everything: dict[tuple[int, int], float]) -> None:
    a, b = house.add("a"), house.add("b")
    house.check(tokens=40)
    assert a.rows()
    assert b.rows()
    house.publish({"a": everything, "b": {}})
    eventually(lambda: house.resident("b") == set())
    b.seen.clear()
    for seed in range(4):
        house.check(tokens=40, seed=seed)
    assert b.rows() == 0
    assert house.calls("inline") == 0
    layer = house.store.manifest.moe_layers[0]
    house.publish({"a": {(layer, 0): 0.25, (layer, 1): 1.0}, "b": {(layer, 0): 0.75}})
    eventually(lambda: house.resident("b") == {(layer, 0)})
    a.seen.clear()
    for seed in range(100):
        house.check(tokens=8, seed=seed)
    mine = sum(count for _, _, segments in a.seen for expert, count in segments if expert == 0)
    assert {expert for _, _, segments in b.seen for expert, _ in segments} == {0}
    assert mine / (mine + b.rows()) == pytest.approx(0.25, abs=0.03)
    assert house.calls("inline") > 0  # experts 2 and 3 are planned nowhere
    eventually(lambda: a._ffn.loaded == {(layer, 0), (layer, 1)}, 5.0)
    eventually(lambda: house.figure("a", "resident_bytes") == 2 * house.store.manifest.slice_bytes)


def test_rows_follow_a_new_plan_within_milliseconds(house: House, everything: dict[tuple[int, int], float]) -> None:
    a, b = house.add("a"), house.add("b")
    with house.busy() as ended:
        took = []
        for turn in range(20):
            winner, loser = (a, b) if turn % 2 else (b, a)
            took.append(house.publish({winner.name: everything, loser.name: {}}))
            wait_until_alone(house, winner.name)  # until it is ready, the other one goes on
            swapped = len(ended)
            wait_for(ended, swapped + 2)  # the layer under way may have begun before
            after = len(loser.seen)
            wait_for(ended, swapped + 4)
            assert len(loser.seen) == after
    print("plan to table, ms:", [round(1000 * each, 1) for each in sorted(took)])
    assert sorted(took)[10] < 0.1
    assert house.calls("inline") == house.calls("retry") == 0


def test_rows_of_a_slice_that_is_not_resident_are_computed_and_counted(house: House) -> None:
    a = house.add("a")
    house.publish({"a": {}})
    eventually(lambda: not a._ffn.loaded)
    house.check()
    assert a.rows() == 0
    rows, layer = torch.randn(3, house.store.manifest.hidden_size), house.store.manifest.moe_layers[1]
    out = torch.empty_like(rows)
    a.compute(layer, [(2, 3)], rows, out)  # as a gateway that has not read the plan yet
    torch.testing.assert_close(out, ExpertFFN(house.store)(layer, 2, rows))
    eventually(lambda: house.figure("a", "misses") == 1)
    eventually(lambda: not a._ffn.loaded)


def test_a_replica_that_is_told_to_go_loses_no_row_and_gets_none_later(house: House) -> None:
    a, b = house.add("a", SLOW), house.add("b", SLOW)
    with house.busy() as ended:
        closing = threading.Thread(target=a.close)
        started = time.monotonic()
        closing.start()
        while "a" in house.fleet.table.links:
            assert time.monotonic() < started + 2
        learned = time.monotonic()
        after = len(ended)
        wait_for(ended, after + 6)
        closing.join()
        closed = time.monotonic()
        last = ended[after]  # the end of the layer that was under way
    assert a.seen
    assert [at for at, *_ in a.seen if at > last] == []
    assert closed - started < 1.5  # the gateway hung up, nobody waited for the deadline
    assert learned - started < 0.5
    assert house.calls("retry") == house.calls("inline") == 0
    assert len(b.seen) > 5
    assert house.entry("a") is None


def test_a_replica_that_is_told_to_go_says_so_and_waits_for_who_does_not_listen(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = house.add("a")
    monkeypatch.setattr("experts.replica._HANG_UP_S", 0.5)
    link = house.fleet.table.links["a"]  # somebody holds on to it
    closing = threading.Thread(target=a.close)
    started = time.monotonic()
    closing.start()
    eventually(lambda: house.figure("a", "draining") is True)
    assert "a" not in house.fleet.table.links or closing.is_alive()
    closing.join()
    assert time.monotonic() - started >= 0.5
    link.channel.close()


def test_an_emulated_device_takes_its_time_and_says_what_it_is(house: House) -> None:
    device = DevicePolicy(kind="emulated", rows_per_s=1000, weight_read_ms=20, call_ms=5)
    a = house.add("a", ExpertPolicy(device=device))
    for seed in range(2):
        started = time.monotonic()
        house.check(seed=seed)
        assert time.monotonic() - started >= 0.005 + 0.02 * len(a.seen[-1][2])
    for seed in range(12):
        house.check(tokens=3, seed=seed)
    eventually(lambda: house.figure("a", "calls") == 14)
    entry = house.entry("a")
    assert entry is not None
    assert entry.device == "emulated (1000 rows/s, 20 ms)"
    assert entry.read_s == pytest.approx(0.022, rel=0.2)
    assert entry.calls == len(a.seen) == 14
    assert entry.busy_s >= 14 * 0.045


def test_compiled_code_lets_go_of_what_the_plan_takes_away(
    redis_url: str, tmp_path: Path, compiled_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_loaded", False)
    assert kernels.load(compiled_folder)
    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_local_experts=4,
        num_attention_heads=4, num_key_value_heads=2, dtype="float32",
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "checkpoint")
    store = prepare(tmp_path / "checkpoint", tmp_path / "store")
    house = House(store, Directory(redis_url, "compiled"))
    with house.exits:
        a = house.add("a")
        for seed in range(40):
            house.check(tokens=3, seed=seed, layer=seed % 2)
        assert len(a.seen) < 10  # the rest never saw Python
        eventually(lambda: house.figure("a", "calls") == 40)
        assert house.figure("a", "rows") == 40 * 3 * TOP_K
        assert house.figure("a", "read_s") > 0
        house.publish({"a": {(0, 0): 1.0}})
        eventually(lambda: a._ffn.loaded == {(0, 0)}, 5.0)

        def mapped() -> set[str]:  # of all this process has: the reference's and the gateway's own are in it too
            return {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}

        house.inline.tidy()
        house.forget()
        eventually(lambda: str(store.path / "experts" / "3.safetensors") not in mapped())
        for seed in range(10):
            house.check(tokens=3, seed=seed)
        assert house.figure("a", "misses") == 0


def test_without_replicas_only_what_was_needed_is_held_and_only_for_a_while(store: ExpertStore) -> None:
    clock = [0.0]
    ffn = ExpertFFN(store)
    inline = InlineExperts(ffn, keep_s=10.0, clock=lambda: clock[0])
    layer, rows = store.manifest.moe_layers[0], torch.randn(4, store.manifest.hidden_size)
    compute: Callable[..., None] = inline.compute
    compute(layer, [(0, 1), (2, 3)], rows, torch.empty_like(rows))
    assert inline.rows == 4
    assert inline.resident_bytes == 2 * store.manifest.slice_bytes
    clock[0] = 8.0
    compute(layer, [(2, 4)], rows, torch.empty_like(rows))
    clock[0] = 11.0
    inline.tidy()
    assert ffn.loaded == {(layer, 2)}
    clock[0] = 30.0
    inline.tidy()
    assert inline.resident_bytes == 0
    assert inline.rows == 8
