"""The real engine in this process, every expert inline, on a clock that passes by the rows it computes.

A step takes `STEP_S` and what its rows do, and where nothing is to be done the clock goes on to the next arrival. So
what happens does not depend on what else the machine does, idle time takes none, and a seed tells it all (on the same
machine and installation: kernels that sum in another order make other texts).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from deploy.models import cache_dir
from experts import kernels
from experts.families import moe_modules
from experts.ffn import ExpertFFN
from experts.store import ExpertStore
from gateway import compilation
from gateway.batch import Batch
from gateway.dispatch import Dispatcher
from gateway.engine import Engine, EngineSettings
from gateway.fleet import Fleet
from gateway.look_ahead import Gates
from gateway.messages import Delta, SamplingParams, Submit
from gateway.model import load_model
from gateway.routing_log import RoutingLog
from gateway.routing_packer import RoutingPacker
from gateway.table import DispatchTable
from predictor.load_step import LoadStep
from predictor.shape import ModelShape
from predictor.signals import LoadSignals
from replay.traffic import Request

STEP_S, PROMPT_ROW_S, ANSWER_ROW_S = 0.010, 0.0001, 0.00025
"""About what a step takes on two cores with the default model's experts in replicas."""

_TEMPERATURE = 0.9
_MOST_WAITING = 128  # two full batches; who comes later is refused, as services do


class VirtualClock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """What time it is."""
        return self.now


class VirtualEngine:
    """Answers requests that arrive on its own clock, and tells the load of every step."""

    def __init__(self, store: ExpertStore, *, threads: int = 1, kv_cache_gib: float = 0.5) -> None:
        """Raise StoreError or ModelError for a store that can't be served. `threads` of torch compute."""
        compiled, manifest = cache_dir() / "compiled", store.manifest
        kernels.load(compiled)
        inline = ExpertFFN(store, fast=True)
        for layer, expert in store.slices:
            inline.load(layer, expert)
        self.clock = VirtualClock()
        self._log = _TimedLog(tuple(manifest.moe_layers), self.clock)
        dispatcher = Dispatcher(NoFleet(), inline, manifest.num_experts, 1, 1.0)
        model = load_model(store, experts=self._log.watch(dispatcher))
        model.threads = threads
        torch.set_num_threads(threads)
        compilation.adopt(model, compiled)
        self._log.gates = Gates(model.network, moe_modules(model.network), manifest.top_k)
        self.settings = EngineSettings(kv_cache_gib=kv_cache_gib, max_waiting=_MOST_WAITING)
        self._engine = Engine(model, self.settings, clock=self.clock, routing=self._log)
        self.context = model.context_length
        self.compiled = model.compiled
        """Decoder layers that run compiled: those that a service has left in the cache."""
        self.shape = ModelShape(
            manifest.fingerprint, tuple(manifest.moe_layers), manifest.num_experts, manifest.top_k, model.vocab_size
        )
        self._packer = RoutingPacker(self._log, manifest.num_experts, self.settings.token_budget)
        self._signals = LoadSignals(self.shape, oracle=True)
        self._left: dict[str, int] = {}

    def run(self, requests: Iterator[Request]) -> Iterator[list[LoadStep]]:
        """Answer `requests`, in order of arrival; yield the load of the steps as they are done, a few at a time."""
        coming, number = next(requests, None), 0
        while coming is not None or self._engine.has_work:
            while coming is not None and coming.time_s <= self.clock.now:
                self._take(f"{number}", coming)
                coming, number = next(requests, None), number + 1
            if self._engine.has_work:
                self._obey(self._engine.step())
                yield self._loads()
            elif coming is not None:
                self.clock.now = coming.time_s

    def request_s(self, prompt: float, answer: float) -> float:
        """What a request of so many tokens takes of the clock where others fill its batches."""
        steps = max(answer / self.settings.max_sequences, (prompt + answer) / self.settings.token_budget)
        return STEP_S * steps + PROMPT_ROW_S * prompt + ANSWER_ROW_S * answer

    def _take(self, name: str, request: Request) -> None:
        params = SamplingParams(max_tokens=request.max_tokens, temperature=_TEMPERATURE, seed=request.seed)
        self._engine.add(Submit(request_id=name, prompt_token_ids=request.prompt.tolist(), params=params))
        self._left[name] = request.answer_tokens

    def _obey(self, deltas: list[Delta]) -> None:
        """Answers end where their requests say, as they do with a client's stop strings."""
        for delta in deltas:
            self._left[delta.request_id] -= len(delta.token_ids)
            if delta.finish_reason is not None or self._left[delta.request_id] <= 0:
                self._engine.cancel(delta.request_id)
                del self._left[delta.request_id]

    def _loads(self) -> list[LoadStep]:
        chunk = self._packer.pack()
        if chunk is None:
            return []
        layers, experts = len(self.shape.layers), self.shape.experts
        return [self._signals.observe(routing) for routing in chunk.routings(layers, experts)]


class _TimedLog(RoutingLog):
    """Lets a step's time pass when its rows are known."""

    def __init__(self, layers: tuple[int, ...], clock: VirtualClock) -> None:
        super().__init__(layers)
        self._clock = clock

    def begin(self, batch: Batch) -> list[tuple[int, int, int]]:
        works = super().begin(batch)
        self._clock.now += STEP_S + sum(
            prompt * PROMPT_ROW_S + (rows - prompt) * ANSWER_ROW_S for _, rows, prompt in works
        )
        return works


class NoFleet(Fleet):
    """Nobody: every expert runs inline."""

    def __init__(self) -> None:
        self.table = DispatchTable({}, {})
