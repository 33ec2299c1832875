"""What the steps of an engine route: noted beside the layers at the cost of two small copies each, packed elsewhere."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence as Seq

import torch

from gateway.batch import Batch
from gateway.layer_calls import ExpertsFunction
from gateway.look_ahead import Gates, look_ahead
from gateway.routed import RoutedLayer, RoutedStep
from gateway.routing_chunk import QUEUE_STEPS
from gateway.scheduler import Scheduler
from gateway.sequence import Sequence

_MOST_STEPS = 512
_MOST_BYTES = 64 << 20
"""Bounds for what waits to be packed."""
_KEPT_BYTES = 4 << 20
"""Of a step, its layers' inputs are kept up to this size; larger steps can afford to ask the routers at once."""
_ASKED_ROWS = 512
"""Routers are asked for about so many rows at a time: that takes hardly longer than for one."""


class RoutingLog:
    """Notes every step of one engine. What nobody takes away in time is dropped and counted; a step never waits.

    `watch`, `begin` and `end` belong to the engine's thread, `take` to one other.
    """

    def __init__(self, layers: Seq[int]) -> None:
        """`layers` are the numbers of the model's MoE layers."""
        self.layers = tuple(layers)
        self.gates: Gates | None = None
        """The model's routers, once it is there; without them nothing looks ahead."""
        self.dropped = 0
        """Steps that were lost because they were not taken in time."""
        self._next = dict(zip(self.layers, self.layers[1:], strict=False))
        self._row_bytes = 0
        self._step: RoutedStep | None = None
        self._lock = threading.Lock()
        self._fresh: list[RoutedStep] = []
        self._fresh_rows = 0
        self._steps: deque[RoutedStep] = deque()
        self._bytes = 0

    @property
    def waiting(self) -> int:
        """Steps that wait to be taken."""
        return len(self._steps) + len(self._fresh)

    def watch(self, experts: ExpertsFunction) -> ExpertsFunction:
        """`experts`, with every call noted."""

        def watched(layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            step = self._step
            if step is not None:
                # Copies: compiled layers use their memory again.
                kept = step.rows * self._row_bytes <= _KEPT_BYTES
                noted = RoutedLayer(index.clone(), hidden.clone(), None) if kept else self._asked(layer, hidden, index)
                step.layers[layer] = noted
            return experts(layer, hidden, index, weights)

        return watched

    def begin(self, batch: Batch) -> list[tuple[int, int, int]]:
        """A step starts; one that did not come to its end is forgotten. Its works, as `StepHead` has them."""
        works = []
        for work in batch.works:
            sequence = work.sequence
            prompt = min(max(sequence.prompt_length - sequence.computed, 0), work.count)
            works.append((sequence.rank[1], work.count, prompt))
        self._step = RoutedStep(works, batch.token_ids, len(batch.token_ids))
        return works

    def end(self, scheduler: Scheduler, time_s: float) -> None:
        """The step that began has ended; `scheduler` is as it leaves it."""
        step, self._step = self._step, None
        if step is None or len(step.layers) < len(self.layers):
            return
        step.size = step.rows * self._measured(step)
        if self.waiting >= _MOST_STEPS or self._bytes + step.size > max(_MOST_BYTES, step.size):
            self.dropped += 1
            return
        step.time_s = time_s
        step.running = [
            (s.rank[1], max(s.prompt_length - s.computed, 0), s.length_limit - len(s.tokens)) for s in scheduler.running
        ]
        step.queue = _queue(scheduler)
        step.waiting = len(scheduler.waiting)
        step.waiting_tokens = sum(len(s.tokens) for s in scheduler.waiting)
        with self._lock:
            self._bytes += step.size
            self._fresh.append(step)
            self._fresh_rows += step.rows
        if self._fresh_rows >= _ASKED_ROWS:
            fresh = self._take_fresh()
            if self.gates is not None:
                look_ahead(self.gates, self.layers, fresh)
            self._steps.extend(fresh)

    def take(self, most_rows: int) -> list[RoutedStep]:
        """The next steps, about `most_rows` rows; those whose routers were not asked only if there are no others.

        So a busy engine asks in its own thread: another one would take a core from its kernels.
        """
        if not self._steps:
            steps = self._take_fresh()
        else:
            steps, rows = [], 0
            while self._steps and rows < most_rows:
                steps.append(self._steps.popleft())
                rows += steps[-1].rows
        with self._lock:
            self._bytes -= sum(step.size for step in steps)
        return steps

    def _take_fresh(self) -> list[RoutedStep]:
        with self._lock:
            fresh, self._fresh, self._fresh_rows = self._fresh, [], 0
        return fresh

    def _measured(self, step: RoutedStep) -> int:
        """Bytes of one row in all layers, as far as they are kept."""
        if not self._row_bytes:
            self._row_bytes = sum(noted.rows[:1].nbytes for noted in step.layers.values() if noted.rows is not None)
        return self._row_bytes if step.rows * self._row_bytes <= _KEPT_BYTES else 0

    def _asked(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> RoutedLayer:
        """A layer of a step whose inputs are too large to keep."""
        after = self._next.get(layer)
        trusted = self.gates is not None and self.gates.trust(layer, hidden, index)
        if self.gates is None or after is None or not trusted:
            return RoutedLayer(index.clone(), None, None)
        return RoutedLayer(index.clone(), None, self.gates.choose(after, hidden))


def _queue(scheduler: Scheduler) -> list[tuple[Sequence, int, int]]:
    """Who waits to be prefilled, and which of its tokens, in order of service."""
    room = QUEUE_STEPS * scheduler.token_budget
    queue = [(s, s.computed, len(s.tokens)) for s in scheduler.running if s.pending > 1]
    room -= sum(end - start for _, start, end in queue)
    for sequence in scheduler.waiting:
        if room <= 0:
            break
        queue.append((sequence, 0, len(sequence.tokens)))
        room -= len(sequence.tokens)
    return queue
