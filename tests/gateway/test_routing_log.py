"""What is told of a step is what its layers really routed: chunks, decoding, preemption, found prefixes, look-ahead."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experts.families import moe_modules
from gateway.engine import Engine, EngineSettings
from gateway.layer_calls import ExpertsFunction
from gateway.look_ahead import Gates
from gateway.model import load_model
from gateway.routing_log import RoutingLog
from gateway.routing_packer import RoutingPacker
from predictor.routing import StepRouting
from tests.gateway.inline_model import InlineFamily, drain, failures, prompts, single_threaded, submit

Calls = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Layer -> (its input, the experts its router chose)."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_threaded():
        yield


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> InlineFamily:
    return InlineFamily("qwen3_moe", tmp_path_factory.mktemp("routing"))


class Watched:
    """An engine whose routing is noted, and what its experts were really asked."""

    def __init__(self, family: InlineFamily, *, gates: bool = True, **settings: Any) -> None:
        self.steps: list[Calls] = []
        self.tokens: list[list[int]] = []
        self.manifest = family.store.manifest
        self.log = RoutingLog(self.manifest.moe_layers)
        self.model = load_model(family.store, experts=self.log.watch(self._spy(family.experts)))
        if gates:
            modules = moe_modules(self.model.network)
            self.log.gates = Gates(self.model.network, modules, self.manifest.top_k)
        settings = {"kv_cache_gib": 0.001, "block_size": 4, "token_budget": 16, "max_sequences": 4, **settings}
        self.engine = Engine(
            self.model, EngineSettings(**settings), clock=iter(range(10**6)).__next__, routing=self.log
        )
        self.packer = RoutingPacker(
            self.log, self.manifest.num_experts, settings["token_budget"], settings["max_sequences"]
        )
        forward = self.model.forward

        def spied(batch: Any) -> torch.Tensor:
            self.steps.append({})
            self.tokens.append(batch.token_ids.tolist())
            return forward(batch)

        self.model.forward = spied  # type: ignore[method-assign]

    def _spy(self, experts: ExpertsFunction) -> ExpertsFunction:
        def spy(layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            if self.steps:
                self.steps[-1][layer] = hidden.clone(), index.clone()
            return experts(layer, hidden, index, weights)

        return spy

    def told(self) -> list[StepRouting]:
        """Every step since the last time."""
        found: list[StepRouting] = []
        while (chunk := self.packer.pack()) is not None:
            found += chunk.routings(len(self.manifest.moe_layers), self.manifest.num_experts)
        return found

    def answer(self, *asked: list[int], **params: Any) -> list[StepRouting]:
        for number, prompt in enumerate(asked):
            self.engine.add(submit(str(number), prompt, **params))
        drain(self.engine)
        return self.told()


def assert_true(watched: Watched, told: list[StepRouting]) -> None:
    """Rows, tokens and experts are those that the layers saw."""
    assert len(told) == len(watched.steps)
    for step, calls, tokens in zip(told, watched.steps, watched.tokens, strict=True):
        assert step.token_ids.tolist() == tokens
        assert len(step.sequences) == len(step.prefill) == len(tokens)
        for place, layer in enumerate(watched.manifest.moe_layers):
            assert step.experts[place].tolist() == calls[layer][1].tolist()


def test_every_layer_of_every_step_is_told(family: InlineFamily) -> None:
    watched = Watched(family)
    told = watched.answer(*prompts(9, 30, 5), max_tokens=6)
    assert_true(watched, told)
    assert sum(step.prefill.sum() for step in told) == 9 + 30 + 5
    assert sum((~step.prefill).sum() for step in told) == 3 * 5  # the last token of each is never computed
    assert all(a.time_s < b.time_s for a, b in itertools.pairwise(told))


def test_a_prompt_in_chunks_keeps_its_number_and_says_what_is_left(family: InlineFamily) -> None:
    watched = Watched(family)
    told = watched.answer(*prompts(40), max_tokens=3)
    assert [len(step.token_ids) for step in told] == [16, 16, 8, 1, 1]
    assert [step.prefill.all() for step in told] == [True, True, True, False, False]
    assert {number for step in told for number in step.sequences.tolist()} == {1}
    assert [step.prompt_left.tolist() for step in told] == [[24], [8], [0], [0], []]
    assert [step.tokens_left.tolist() for step in told] == [[3], [3], [2], [1], []]
    assert [step.running.tolist() for step in told] == [[1], [1], [1], [1], []]


def queued_tokens(step: StepRouting) -> list[int]:
    return [token for number, start, last in step.queue for token in step.prompts[number][start:last].tolist()]


def test_what_waits_is_told_in_order_of_service(family: InlineFamily) -> None:
    watched = Watched(family, max_sequences=1, token_budget=10)
    asked = prompts(25, 7, 12)
    first = watched.answer(*asked, max_tokens=2)[0]
    assert queued_tokens(first) == asked[0][10:] + asked[1] + asked[2]
    assert (first.waiting, first.waiting_tokens, first.token_budget, first.max_sequences) == (2, 7 + 12, 10, 1)


def test_the_queue_is_told_up_to_a_bound(family: InlineFamily) -> None:
    watched = Watched(family, max_sequences=1, token_budget=2)
    first = watched.answer(*prompts(60, 60, 60), max_tokens=1)[0]
    assert [last - start for _, start, last in first.queue] == [58, 60, 60], (
        "the first 64 x 2, and what is begun of them"
    )
    assert first.waiting_tokens == 120


def test_tokens_found_in_the_cache_are_no_rows(family: InlineFamily) -> None:
    watched = Watched(family)
    [prompt] = prompts(21)
    watched.answer(prompt, max_tokens=2)
    watched.steps, watched.tokens = [], []
    told = watched.answer(prompt, max_tokens=2)
    assert_true(watched, told)
    assert sum(step.prefill.sum() for step in told) == 1  # five blocks of four were there


def test_what_a_preempted_sequence_computes_again_is_told_as_what_it_was(family: InlineFamily) -> None:
    watched = Watched(family, kv_cache_gib=0.00006, prefix_caching=False)
    told = watched.answer(*prompts(12, 12, 12), max_tokens=30)
    assert watched.engine.scheduler.preemptions > 0
    assert_true(watched, told)
    for step in told:
        for number in set(step.sequences.tolist()):
            mine = step.prefill[step.sequences == number]
            assert mine.tolist() == sorted(mine.tolist(), reverse=True)
    prompt_rows = sum(step.prefill.sum() for step in told)
    assert prompt_rows > 36
    assert prompt_rows % 12 == 0


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "deepseek_v2", "gpt_oss", "granitemoe"])
def test_look_ahead_is_the_next_layers_router_on_this_layers_input(name: str, tmp_path: Path) -> None:
    watched = Watched(InlineFamily(name, tmp_path))
    told = watched.answer(*prompts(30, 30), max_tokens=4)
    layers, experts = watched.manifest.moe_layers, watched.manifest.num_experts
    modules = dict(watched.model.network.named_modules())
    assert len(told) > 4
    for step, calls in zip(told, watched.steps, strict=True):
        assert not step.look_ahead[0].any()
        for place, (before, layer) in enumerate(itertools.pairwise(layers), 1):
            block = modules[f"model.layers.{layer}.block_sparse_moe" if name == "granitemoe" else
                            f"model.layers.{layer}.mlp"]  # fmt: skip
            router: Any = block.router if hasattr(block, "router") else block.gate
            with torch.inference_mode():
                chosen = router(calls[before][0])[2]
            by_hand = np.bincount(chosen.flatten().numpy(), minlength=experts)
            assert step.look_ahead[place].tolist() == by_hand.tolist()


def test_large_steps_ask_the_routers_at_once_and_tell_the_same(
    family: InlineFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompts(40, 40)
    kept = Watched(family).answer(*asked, max_tokens=4)
    monkeypatch.setattr("gateway.routing_log._KEPT_BYTES", 0)
    at_once = Watched(family).answer(*asked, max_tokens=4)
    assert [step.look_ahead.tolist() for step in at_once] == [step.look_ahead.tolist() for step in kept]
    assert any(step.look_ahead.any() for step in kept)


def test_a_router_that_can_not_be_asked_has_no_look_ahead(family: InlineFamily) -> None:
    watched = Watched(family)
    modules = moe_modules(watched.model.network)
    last = max(modules)
    block: Any = dict(watched.model.network.named_modules())[f"model.layers.{last}.mlp"]
    own, asked = block.gate.forward, 0

    def elsewhere(rows: torch.Tensor) -> Any:
        nonlocal asked
        asked += 1
        return tuple(part.roll(1, 0) for part in own(rows))  # says something else when it is asked from outside

    gates = Gates(watched.model.network, modules, watched.manifest.top_k)
    rows = torch.randn(20, watched.manifest.hidden_size)
    with torch.inference_mode():
        chosen = own(rows)[2]
        assert gates.trust(last, rows, chosen)
        block.gate.forward = elsewhere
        doubting = Gates(watched.model.network, modules, watched.manifest.top_k)
        assert not doubting.trust(last, rows, chosen)
    assert not doubting.works(last)
    assert doubting.choose(last, rows) is None
    assert asked == 1


def test_without_routers_nothing_looks_ahead(family: InlineFamily) -> None:
    told = Watched(family, gates=False).answer(*prompts(20), max_tokens=2)
    assert not any(step.look_ahead.any() for step in told)


def test_a_step_that_failed_is_not_told(family: InlineFamily) -> None:
    watched = Watched(family)
    experts = watched.model.calls.answer

    def broken(layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if layer == max(watched.manifest.moe_layers):
            raise RuntimeError("the last layer is broken")
        return experts(layer, hidden, index, weights)

    watched.model.calls.answer = broken
    watched.engine.add(submit("one", prompts(5)[0]))
    assert failures(watched.engine.step())
    assert watched.told() == []
    watched.model.calls.answer = experts
    watched.steps, watched.tokens = [], []
    assert_true(watched, watched.answer(*prompts(6), max_tokens=2))


def test_what_nobody_takes_is_dropped_and_counted(family: InlineFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.routing_log._MOST_STEPS", 3)
    watched = Watched(family)
    watched.engine.add(submit("one", prompts(5)[0], max_tokens=9))
    drain(watched.engine)
    assert watched.log.dropped == 9 - 3
    chunk = watched.packer.pack()
    assert chunk is not None
    assert (len(chunk.steps), chunk.dropped) == (3, 6)
    watched.engine.add(submit("two", prompts(5)[0], max_tokens=2))
    drain(watched.engine)
    chunk = watched.packer.pack()
    assert chunk is not None
    assert (len(chunk.steps), chunk.dropped) == (2, 0)


def test_rehearsals_are_not_told(family: InlineFamily) -> None:
    watched = Watched(family)
    from gateway.compilation import Echo

    watched.model.between_steps = lambda: watched.model.rehearse(3, Echo(), Echo.experts)
    assert_true(watched, watched.answer(*prompts(6), max_tokens=3))
