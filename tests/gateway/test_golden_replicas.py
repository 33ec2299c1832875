"""The golden test: experts in Serve replicas, and greedy tokens equal transformers' `generate`, for every family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ray import serve

from experts.deployment import expert_deployment
from experts.ffn import ExpertFFN
from experts.store import ExpertStore, prepare
from gateway.dispatch import Dispatcher
from gateway.engine import Engine, EngineSettings
from gateway.fleet import Fleet
from gateway.messages import SamplingParams, Submit
from gateway.model import load_model
from placement import plan
from placement.plan import Plan
from placement.policy import ExpertPolicy, UnitPolicy
from placement.unit import Unit, make_units
from recovery.directory import Directory
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.waiting import eventually

pytestmark = pytest.mark.ray

PROMPTS = [[5, 17, 3], [9, 44, 2, 61, 8, 30, 77, 12, 5, 90, 33], [101, 7, 64, 20, 2, 11]]
TOKENS = 32


class Root:
    """Holds the expert deployments of one application together; takes no requests."""

    def __init__(self, *experts: object) -> None:
        pass


class Service:
    """The expert deployments of one checkpoint in Serve, and a gateway's engine that uses them."""

    def __init__(self, store: ExpertStore, redis_url: str) -> None:
        self.store = store
        self.directory = Directory(redis_url, store.manifest.fingerprint[:12])
        policy = ExpertPolicy(unit=UnitPolicy(experts=-(-store.manifest.num_experts // 2)), min_rows_per_replica=1)
        self.units = make_units(policy.unit, store.manifest.num_experts, store.manifest.moe_layers)
        self._policy = policy
        self._epoch = 0
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Service:
        manifest, secret = self.store.manifest, self.directory.secret()
        url, namespace = self.directory.url, manifest.fingerprint[:12]
        experts = [expert_deployment(u, str(self.store.path), self._policy, url, namespace, None) for u in self.units]
        serve.run(serve.deployment(Root).options(num_replicas=1, ray_actor_options={"num_cpus": 0}).bind(*experts),
                  name="golden", route_prefix=None)  # fmt: skip
        self._exits.callback(serve.delete, "golden")
        self.scale(2)
        self.fleet = self._exits.enter_context(Fleet(self.directory, secret, manifest.fingerprint))
        self.inline = ExpertFFN(self.store)
        self.dispatcher = Dispatcher(self.fleet, self.inline, manifest.num_experts, 1, 10.0)
        self._exits.callback(self.dispatcher.close)
        model = load_model(self.store, experts=self.dispatcher)
        self.engine = Engine(model, EngineSettings(kv_cache_gib=0.01, token_budget=8, max_sequences=4))
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def scale(self, replicas: int) -> None:
        """Publish a plan with so many replicas of every unit."""
        self._epoch += 1
        wanted = Plan(epoch=self._epoch, replicas={u.name: replicas for u in self.units}, reason="test")
        self.directory.publish(plan.DOCUMENT, plan.encode(wanted))

    def wait_for(self, replicas: int) -> None:
        """Until the gateway reaches so many replicas of every unit."""
        eventually(lambda: all(len(self._links(unit)) == replicas for unit in self.units), 90.0)

    def _links(self, unit: Unit) -> list[object]:
        return [link for link in self.fleet.table.links.values() if link.entry.unit == unit.name]

    def paths(self) -> set[str]:
        """The paths rows took since the last time this was asked."""
        taken = {path for (_, _, path), count in self.dispatcher.calls.items() if count}
        self.dispatcher.calls.clear()
        return taken

    def generate(self) -> list[list[int]]:
        """Greedy continuations of all prompts at once."""
        greedy = SamplingParams(max_tokens=TOKENS, temperature=0.0)
        for number, prompt in enumerate(PROMPTS):
            self.engine.add(Submit(request_id=str(number), prompt_token_ids=prompt, params=greedy))
        tokens: dict[str, list[int]] = {}
        while self.engine.has_work:
            for delta in self.engine.step():
                assert delta.error is None
                tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
        return [tokens[str(number)] for number in range(len(PROMPTS))]


def _reference(checkpoint: Path) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return [
        model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
        )[0, len(prompt):].tolist()
        for prompt in PROMPTS
    ]  # fmt: skip


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def service(
    request: pytest.FixtureRequest, ray_cluster: int, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, list[list[int]]]]:
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = write_checkpoint(request.param, folder / "checkpoint")
    with Service(prepare(checkpoint, folder / "store"), redis_url) as running:
        yield running, _reference(checkpoint)


def test_tokens_equal_transformers_generate(service: tuple[Service, list[list[int]]]) -> None:
    """Before any replica is up, with rows split over two replicas of each expert, with one, and with none again."""
    running, expected = service
    assert running.generate() == expected
    running.wait_for(2)
    running.paths()
    assert running.generate() == expected
    assert running.paths() == {"replica"}
    running.scale(1)
    running.wait_for(1)
    running.paths()
    assert running.generate() == expected
    assert running.paths() == {"replica"}
    running.scale(0)
    running.wait_for(0)
    running.paths()
    assert running.generate() == expected
    assert running.paths() == {"inline"}
