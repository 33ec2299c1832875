"""Replicas of real Serve under plans: what they hold, how rows move, how they go; the tokens never change."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
from ray import serve

from deploy.models import DEFAULT_MODEL
from experts.deployment import expert_deployment
from experts.ffn import ExpertFFN
from experts.store import ExpertStore, prepare
from gateway.dispatch import Dispatcher
from gateway.engine import Engine, EngineSettings
from gateway.fleet import Fleet
from gateway.inline_experts import InlineExperts
from gateway.messages import SamplingParams, Submit
from gateway.model import load_model
from placement import plan
from placement.plan import Copy, Plan
from placement.policy import DevicePolicy, ExpertPolicy, UnitPolicy
from placement.unit import make_units
from recovery.directory import Directory, ReplicaEntry
from tests.waiting import eventually

pytestmark = pytest.mark.ray

PROMPTS = [[5, 17, 300], [9, 44, 2, 61, 8, 30, 77, 12, 5, 90, 33]]
TOKENS = 24
Slice = tuple[int, int]


class Root:
    """Holds the expert deployments together; takes no requests."""

    def __init__(self, *experts: object) -> None:
        pass


class Pool:
    """Two units of the default model in Serve, on emulated devices, and an engine that uses them."""

    def __init__(self, store: ExpertStore, redis_url: str) -> None:
        device = DevicePolicy(kind="emulated", rows_per_s=100_000, weight_read_ms=1.0)
        self.policy = ExpertPolicy(
            unit=UnitPolicy(experts=store.manifest.num_experts // 2), min_rows_per_replica=1, device=device
        )
        self.store, self.directory = store, Directory(redis_url, "elastic-replicas")
        self.units = make_units(self.policy.unit, store.manifest.num_experts, store.manifest.moe_layers)
        self._epoch = 0
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Pool:
        manifest, url = self.store.manifest, self.directory.url
        experts = [
            expert_deployment(u, str(self.store.path), self.policy, url, "elastic-replicas", None) for u in self.units
        ]
        root = serve.deployment(Root).options(num_replicas=1, ray_actor_options={"num_cpus": 0}).bind(*experts)
        serve.run(root, name="elastic", route_prefix=None)
        self._exits.callback(serve.delete, "elastic")
        self.fleet = self._exits.enter_context(Fleet(self.directory, self.directory.secret(), manifest.fingerprint))
        self.inline = InlineExperts(ExpertFFN(self.store))
        self.dispatcher = Dispatcher(self.fleet, self.inline, manifest.num_experts, 1, 10.0)
        self._exits.callback(self.dispatcher.close)
        model = load_model(self.store, experts=self.dispatcher)
        self.engine = Engine(model, EngineSettings(kv_cache_gib=0.05, token_budget=64, max_sequences=4))
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def publish(self, counts: list[int], copies: dict[str, dict[Slice, float]] | None = None) -> None:
        """Ask for so many replicas of each unit, and for these slices and shares."""
        self._epoch += 1
        given = None if copies is None else {
            name: [Copy(layer, expert, share) for (layer, expert), share in held.items()]
            for name, held in copies.items()
        }  # fmt: skip
        replicas = {unit.name: count for unit, count in zip(self.units, counts, strict=True)}
        wanted = Plan(epoch=self._epoch, replicas=replicas, copies=given, reason="test")
        self.directory.publish(plan.DOCUMENT, plan.encode(wanted))
        eventually(lambda: self.fleet.table.epoch == self._epoch)

    def entries(self, unit: int) -> list[ReplicaEntry]:
        return [entry for entry in self.directory.replicas() if entry.unit == self.units[unit].name]

    def wait_for(self, counts: list[int]) -> None:
        def there() -> bool:
            links = [link.entry.unit for link in self.fleet.table.links.values()]
            return [links.count(unit.name) for unit in self.units] == counts

        eventually(there, 90, f"{counts} replicas")

    def slices(self, unit: int) -> list[Slice]:
        return [(layer, expert) for expert in self.units[unit].experts for layer in self.units[unit].layers]

    def paths(self) -> dict[str, int]:
        """The paths calls took since the last time this was asked."""
        taken: dict[str, int] = {}
        for (_, _, path), count in self.dispatcher.calls.items():
            taken[path] = taken.get(path, 0) + count
        self.dispatcher.calls.clear()
        return taken

    def generate(self, number: int = 0) -> list[list[int]]:
        """Greedy continuations of all prompts at once."""
        greedy = SamplingParams(max_tokens=TOKENS, temperature=0.0)
        for index, prompt in enumerate(PROMPTS):
            self.engine.add(Submit(request_id=str(index), prompt_token_ids=prompt, params=greedy))
        tokens: dict[str, list[int]] = {}
        while self.engine.has_work:
            for delta in self.engine.step():
                assert delta.error is None
                tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        return [tokens[str(index)] for index in range(len(PROMPTS))]

    @contextlib.contextmanager
    def generating(self, expected: list[list[int]]) -> Iterator[list[int]]:
        """The engine goes on all the time; counts answers, which all have to be as expected."""
        rounds: list[int] = []
        wrong: list[object] = []
        stop = threading.Event()

        def run() -> None:
            try:
                while not stop.is_set():
                    found = self.generate()
                    if found != expected:
                        wrong.append(found)
                    rounds.append(len(rounds))
            except BaseException as failure:
                wrong.append(failure)

        engine = threading.Thread(target=run)
        engine.start()
        try:
            yield rounds
        finally:
            stop.set()
            engine.join()
        assert wrong == []
        assert rounds


@pytest.fixture(scope="module")
def pool(ray_cluster: int, redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("elastic")
    with Pool(prepare(DEFAULT_MODEL, folder / "store", dtype="float32"), redis_url) as running:
        yield running


def test_replicas_of_serve_follow_the_plan_while_text_goes_on(pool: Pool) -> None:
    expected = pool.generate()
    assert set(pool.paths()) == {"inline"}
    with pool.generating(expected):
        pool.publish([2, 1])
        pool.wait_for([2, 1])
        a, b = (entry.id for entry in pool.entries(0))
        [c] = (entry.id for entry in pool.entries(1))
        assert all(entry.device == "emulated (100000 rows/s, 1 ms)" for entry in pool.entries(0))

        first, other = pool.slices(0), dict.fromkeys(pool.slices(1), 1.0)
        pool.publish([2, 1], {a: dict.fromkeys(first[::2], 1.0), b: dict.fromkeys(first[1::2], 1.0), c: other})
        eventually(lambda: {e.id: sorted(e.slices) for e in pool.entries(0)}
                   == {a: sorted(first[::2]), b: sorted(first[1::2])}, 20)  # fmt: skip
        half = len(first) // 2 * pool.store.manifest.slice_bytes
        eventually(lambda: all(entry.resident_bytes == half for entry in pool.entries(0)), 20)

        pool.publish([2, 1], {a: {}, b: dict.fromkeys(first, 1.0), c: other})
        eventually(lambda: len(pool.fleet.table.links[b].entry.slices) == len(first), 20)
        pool.publish([1, 1], {b: dict.fromkeys(first, 1.0), c: other})
        pool.wait_for([1, 1])
    paths = pool.paths()
    assert paths["replica"] > 0
    assert "retry" not in paths


def test_a_share_that_is_taken_away_gets_no_row_and_comes_back(pool: Pool) -> None:
    pool.publish([2, 1])
    pool.wait_for([2, 1])
    expected = pool.generate()
    a, b = (entry.id for entry in pool.entries(0))
    [c] = (entry.id for entry in pool.entries(1))
    first, other = pool.slices(0), dict.fromkeys(pool.slices(1), 1.0)
    pool.publish([2, 1], {a: dict.fromkeys(first, 1.0), b: dict.fromkeys(first, 0.0), c: other})
    pool.generate()
    before = settled(pool, b)
    assert pool.generate() == expected
    assert settled(pool, b) == before
    pool.publish([2, 1], {a: dict.fromkeys(first, 0.0), b: dict.fromkeys(first, 1.0), c: other})
    eventually(lambda: pool.generate() == expected and settled(pool, b) > before, 20)
    pool.paths()
    assert pool.generate() == expected
    assert set(pool.paths()) == {"replica"}


def settled(pool: Pool, name: str) -> int:
    """Rows a replica has computed, once the directory knows of all of them."""
    [entry] = [entry for entry in pool.directory.replicas() if entry.id == name]
    seen = [entry.rows]

    def same() -> bool:
        [now] = [entry.rows for entry in pool.directory.replicas() if entry.id == name]
        seen.append(now)
        return len(seen) > 250 and len(set(seen[-250:])) == 1  # longer than entries are old

    eventually(same, 30)
    return seen[-1]


def test_an_emulated_device_takes_its_time(pool: Pool) -> None:
    pool.publish([1, 1])
    pool.wait_for([1, 1])
    pool.generate()
    pool.engine.add(Submit(request_id="x", prompt_token_ids=PROMPTS[0], params=SamplingParams(max_tokens=TOKENS)))
    before = sum(link.entry.busy_s for link in pool.fleet.table.links.values())
    while pool.engine.has_work:
        pool.engine.step()
    layers = len(pool.store.manifest.moe_layers)
    least = TOKENS * layers * pool.store.manifest.top_k * 1e-3  # each token reads top_k experts a layer, 1 ms each
    eventually(lambda: sum(link.entry.busy_s for link in pool.fleet.table.links.values()) - before >= least, 10)


def test_to_zero_and_back_the_text_is_the_same(pool: Pool) -> None:
    expected = pool.generate()
    with pool.generating(expected):
        pool.publish([0, 0], {})
        pool.wait_for([0, 0])
        eventually(lambda: not pool.entries(0) + pool.entries(1))
        pool.paths()
        pool.publish([1, 1])
        pool.wait_for([1, 1])
    pool.paths()
    assert pool.generate() == expected
    assert set(pool.paths()) == {"replica"}
