"""Expert dispatch: a layer's rows to the replicas of their experts and back, or through the inline path.

One frame goes to each replica per layer, all of them before any inline row is computed; the answers are combined in a
fixed order in fp32, so the sum does not depend on who answered first. A replica that fails costs its rows one more
call elsewhere, nothing else: an expert is a pure function.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from experts import kernels
from experts.wire import exchange
from experts.wire.arena import Arena
from experts.wire.channel import Call
from gateway.assignment import Holders, Part, assign
from gateway.fleet import Fleet
from gateway.inline_choice import InlineChoice
from gateway.inline_experts import Inline
from gateway.layer_times import LayerTimes
from gateway.levelling import assign_levelled
from gateway.row_layout import lay_out
from gateway.step_times import StepTimes
from gateway.table import DispatchTable, Link

_WAIT_S = 0.2
"""Between two looks whether the gateway ends, while a step waits for replicas."""


class NoReplicaError(RuntimeError):
    """An expert has no replica, and the gateway may not compute it."""


class Dispatcher:
    """The experts function of a gateway's model. Called by the engine's thread only.

    `inline` computes what no replica serves. Its errors propagate; those of replicas never do.
    """

    def __init__(
        self,
        fleet: Fleet,
        inline: Inline,
        experts: int,
        min_rows: int,
        deadline_s: float,
        *,
        choice: InlineChoice | None = None,
        may_inline: bool = True,
        times: StepTimes | None = None,
    ) -> None:
        """`choice` learns what rows cost, and may keep some here that replicas would compute; without `may_inline`
        none ever are.
        """
        self.calls: collections.Counter[tuple[int, int, str]] = collections.Counter()
        """(layer, expert, path) -> calls; path is ``replica``, ``inline``, ``retry`` or ``hedge``."""
        self.layer_times = LayerTimes()
        self._fleet = fleet
        self._inline = inline
        self._experts = experts
        self._min_rows = min_rows
        self._deadline_s = deadline_s
        self._choice = choice
        self._may_inline = may_inline
        self._times = times or StepTimes()
        self._stopped = False
        self._next: Callable[[], None] | None = None
        self._arena: Arena | None = None
        self._seq = itertools.count(1)
        self._turns: collections.Counter[int] = collections.Counter()

    def __call__(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run ``hidden [T, H]`` through the experts ``top_k_index [T, K]`` and sum them by ``top_k_weights [T, K]``."""
        self._take_over()
        started = self._times.start()
        summed = self._summed(layer, hidden, top_k_index, top_k_weights)
        self.layer_times.observe(time.perf_counter() - started)
        return summed

    def _summed(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if self._may_inline and not self._fleet.table.links:
            summed = self._mixture(layer, hidden, top_k_index, top_k_weights)
            if summed is not None:
                return summed
        rows, place = self._rows(layer, hidden, top_k_index)
        summed = combine(rows, place, top_k_weights).to(hidden.device)
        self._times.end("combine")
        return summed

    def use(
        self, inline: Inline, min_rows: int, deadline_s: float, *, choice: InlineChoice | None, may_inline: bool
    ) -> None:
        """Go on with other settings from the next layer on; any thread may call it."""

        def change() -> None:
            self._inline, self._min_rows, self._deadline_s = inline, min_rows, deadline_s
            self._choice, self._may_inline = choice, may_inline

        self._next = change

    def _take_over(self) -> None:
        if self._next is not None:
            change, self._next = self._next, None
            change()

    def _mixture(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """The whole layer inline, in one call; None where that can't be."""
        self._times.end("dispatch")
        summed = self._inline.mixture(layer, hidden, index, weights)
        if summed is not None:
            spent = self._times.end("inline")
            rows = collections.Counter(index.flatten().tolist())
            parts = [Part(expert, 0, count) for expert, count in rows.items()]
            self._count(layer, parts, "inline")
            if self._choice is not None:
                self._choice.was_here(parts, spent)
        return summed

    def _rows(self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the experts make of the rows, before the sum, and where in it the k-th of row t is: at ``t * K + k``."""
        index = top_k_index.cpu()
        choice = index.numpy().reshape(-1)
        counts = np.bincount(choice, minlength=self._experts).tolist()
        remote, inline = self._assign(layer, counts, frozenset())
        if remote and self._choice is not None and self._choice.here([parts for _, parts in remote], inline):
            remote, inline = assign(counts, lambda expert: _NOBODY, self._min_rows, 0)
        if remote:
            return self._run(_Batch(layer, hidden, index), "replica", frozenset(), remote, inline)
        if len(hidden) == 1:
            return self._single_row(layer, hidden, choice.tolist()), torch.arange(len(choice))
        rows = hidden.new_empty(len(choice), hidden.shape[1])  # without replicas rows need no shared memory
        places = lay_out(hidden, index, inline, rows)
        return self._inline_rows(layer, rows, inline), places

    def _assign(
        self, layer: int, counts: list[int], avoid: frozenset[str]
    ) -> tuple[list[tuple[Link, list[Part]]], list[Part]]:
        table = self._fleet.table
        self._turns[layer] += 1
        remote, inline = self._shared(table, counts, lambda e: _usable(table, layer, e, avoid), self._turns[layer])
        if inline and not self._may_inline:
            self._wait_for_replicas(layer, inline)
            self._take_over()
            return self._assign(layer, counts, frozenset())
        return remote, inline

    def _shared(
        self, table: DispatchTable, counts: list[int], holders: Callable[[int], Holders[Link]], turn: int
    ) -> tuple[list[tuple[Link, list[Part]]], list[Part]]:
        if table.levelled:
            return assign_levelled(counts, holders, lambda link: link.pace(self._min_rows), turn)
        return assign(counts, holders, self._min_rows, turn)

    def _wait_for_replicas(self, layer: int, parts: list[Part]) -> None:
        """Return when replicas came or went; raise NoReplicaError when this gateway ends."""
        if self._stopped:
            raise NoReplicaError(f"expert {parts[0].expert} of layer {layer} has no replica, and the gateway ends")
        self._fleet.wait(_WAIT_S)

    def _single_row(self, layer: int, hidden: torch.Tensor, experts: list[int]) -> torch.Tensor:
        """One row needs no sorting: each of its experts reads it where it is."""
        return self._inline_rows(layer, hidden.expand(len(experts), -1), [Part(e, 0, 1) for e in experts])

    def stop_waiting(self) -> None:
        """Let a step that waits for replicas fail; any thread may call it."""
        self._stopped = True

    def close(self) -> None:
        """Give the shared memory back."""
        self._renew_arena(None)

    def _run(
        self, batch: _Batch, path: str, avoid: frozenset[str], remote: list[tuple[Link, list[Part]]], inline: list[Part]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute every row of `batch` on the replicas of `remote`, and `inline`; return the answers and their places.

        Rows are laid out target by target, so that each finds its own side by side: the k-th answer of the batch's row
        t is ``answers[places[t * K + k]]``.
        """
        turn = next(self._seq)
        total = batch.index.numel()
        arena = self._arena_for(total * batch.row_bytes)
        rows = arena.rows(0, total, batch.width, batch.dtype)
        targets = itertools.chain(*(parts for _, parts in remote), inline)
        places = lay_out(batch.hidden, batch.index, list(targets), rows)
        calls, start = [], 0
        for link, parts in remote:
            segments = tuple((p.expert, p.rows) for p in parts)
            offset = start * batch.row_bytes
            calls.append((link, Call(turn, batch.layer, arena, offset, batch.width, batch.dtype, segments)))
            start += calls[-1][1].rows
            self._count(batch.layer, parts, path)
        failed = self._send(calls)
        results = arena.results(0, total, batch.width, batch.dtype)
        if inline:
            results[start:] = self._inline_rows(batch.layer, rows[start:], inline)
        self._times.end("dispatch")
        failed += self._collect([item for item in calls if item not in failed])
        spent = self._times.end("wait")
        if self._choice is not None and not inline:
            self._choice.was_there([parts for _, parts in remote], spent)
        return (self._run_again(batch.layer, failed, rows, results, avoid) if failed else results), places

    def _send(self, calls: list[_Sent]) -> list[_Sent]:
        """Send all calls; return those whose replica is gone."""
        outcomes = exchange.send([(link.channel, call) for link, call in calls])
        return self._lost(calls, outcomes)

    def _collect(self, calls: list[_Sent]) -> list[_Sent]:
        """Wait for all answers; return the calls that got none."""
        patience = [link.deadline(self._deadline_s) for link, _ in calls]
        outcomes = exchange.receive([link.channel for link, _ in calls], patience)
        for (link, _), outcome in zip(calls, outcomes, strict=True):
            if isinstance(outcome, float):
                link.observe(outcome)
        return self._lost(calls, outcomes)

    def _lost(self, calls: list[_Sent], outcomes: Sequence[exchange.Outcome | None]) -> list[_Sent]:
        """Forget the replicas that failed; return their calls."""
        lost = []
        for (link, call), outcome in zip(calls, outcomes, strict=True):
            if isinstance(outcome, str):
                self._fleet.drop(link, outcome)
                lost.append((link, call))
        return lost

    def _inline_rows(self, layer: int, rows: torch.Tensor, parts: list[Part]) -> torch.Tensor:
        self._count(layer, parts, "inline")
        self._times.end("dispatch")
        results = torch.empty_like(rows, memory_format=torch.contiguous_format)
        self._inline.compute(layer, [(p.expert, p.rows) for p in parts], rows, results)
        spent = self._times.end("inline")
        if self._choice is not None:
            self._choice.was_here(parts, spent)
        return results

    def _run_again(
        self, layer: int, failed: list[_Sent], rows: torch.Tensor, results: torch.Tensor, avoid: frozenset[str]
    ) -> torch.Tensor:
        """Run the rows of `failed` calls elsewhere and return all results, these included."""
        self._renew_arena(None)  # a replica that merely hangs may still write into this one
        results = results.clone()
        avoid |= {link.entry.id for link, _ in failed}
        for _, call in failed:
            start = call.offset // (call.width * call.dtype.itemsize)
            mine = rows[start : start + call.rows]
            counts = [0] * self._experts
            for expert, count in call.segments:
                counts[expert] += count
            index = torch.tensor([expert for expert, count in call.segments for _ in range(count)])[:, None]
            batch = _Batch(layer, mine, index)
            again, places = self._run(batch, "retry", avoid, *self._assign(layer, counts, avoid))
            results[start : start + call.rows] = again[places]
        return results

    def _count(self, layer: int, parts: list[Part], path: str) -> None:
        for part in parts:
            self.calls[layer, part.expert, path] += 1

    def _arena_for(self, size: int) -> Arena:
        if self._arena is None or self._arena.capacity < size:
            self._renew_arena(Arena.create(size))
        assert self._arena is not None
        return self._arena

    def _renew_arena(self, arena: Arena | None) -> None:
        if self._arena is not None:
            self._arena.close()
        self._arena = arena


_NOBODY: Holders[Link] = Holders.of([])
_Sent = tuple[Link, Call]


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Rows ``hidden [T, H]`` of one layer for the experts ``index [T, K]`` (on the CPU)."""

    layer: int
    hidden: torch.Tensor
    index: torch.Tensor

    @property
    def width(self) -> int:
        return self.hidden.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden.dtype

    @property
    def row_bytes(self) -> int:
        return self.width * self.dtype.itemsize


def _usable(table: DispatchTable, layer: int, expert: int, avoid: frozenset[str]) -> Holders[Link]:
    holders = table.holders(layer, expert)
    return holders.only(lambda link: link.entry.id not in avoid) if avoid else holders


def combine(rows: torch.Tensor, place: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum ``rows[place]`` (``[T * K, H]``) by ``weights [T, K]`` in fp32, k by k; ``[T, H]`` in the rows' dtype."""
    if kernels.sums(rows):
        return kernels.weighted_sum(rows, place, weights)
    mine = rows.index_select(0, place.to(rows.device)).view(*weights.shape, -1)
    return torch.bmm(weights.float().to(rows.device).unsqueeze(1), mine.float()).squeeze(1).to(rows.dtype)
