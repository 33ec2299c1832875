"""What is known about the rows to come, kept up to date step by step.

Three sources: the tokens that wait for prefill, through what is known of each token's experts (early layers route
mostly by token identity); the running sequences, which decode much as they did so far; the prompts that have begun.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from predictor.load_step import SIGNALS, LoadStep
from predictor.queue_ahead import QueueAhead
from predictor.routed_rows import RoutedRows, follows_in
from predictor.routing import StepRouting
from predictor.sequences import RunningSequences
from predictor.shape import ModelShape
from predictor.token_affinity import TokenAffinity

_MEAN_MEMORY = 2000.0  # rows
# What a step may cost, in cells of tables looked up: so many for each layer, of which a fresh look takes some anyway.
_CELLS_PER_LAYER, _CELLS_ANYWAY = 8_000, 60_000
_LOOKED_UP = 8  # times what a step may cost, at least, for prompts that have joined the queue since the last look
_PASSES = 6  # over the cells of who waits and who runs, at each look
_MOST_KEPT = 2048  # rows that wait to be learned from


class LoadSignals:
    """Turns each step's routing into a `LoadStep`, and learns from it."""

    def __init__(self, shape: ModelShape, *, max_bytes: int = 64 << 20, oracle: bool = False) -> None:
        """`max_bytes` bounds the memory of the affinity tables; `oracle`: fill in `LoadStep.foreseen`, to judge by."""
        self._oracle = oracle
        self.shape = shape
        self._cells = len(shape.layers) * shape.experts
        self._chosen = len(shape.layers) * shape.top_k
        self._affinity = TokenAffinity(shape.vocabulary, self._cells, max_bytes=max_bytes)
        self._sequences = RunningSequences(self._cells)
        self._prompt_mean = np.full(self._cells, shape.top_k / shape.experts, np.float32)
        self._decode_mean = self._prompt_mean.copy()
        self._worth = _CELLS_PER_LAYER * len(shape.layers)  # cells
        self._queue = QueueAhead(self._affinity, self._cells)
        self._fresh: list[RoutedRows] = []
        self._running_signals: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
        self._wait = self._waited = 0
        self._offsets = (np.arange(len(shape.layers)) * shape.experts)[:, None, None]

    def observe(self, step: StepRouting) -> LoadStep:
        """Learn what `step` routed; its load, and what is known after it."""
        cells = (self._offsets + step.experts).transpose(1, 0, 2).reshape(len(step.token_ids), self._chosen)
        rows = int(step.prefill.sum())
        prefill, decode = self._count(cells, step.prefill, rows)
        self._learn_means(prefill, rows, decode, len(step.prefill) - rows)
        foreseen = self._foreseen(step)
        self._sequences.follow(step)
        self._fresh.append(RoutedRows.of(step, cells, self._sequences.gain))
        signals, signal_rows = self._signals(step, rows)
        shape = (len(self.shape.layers), self.shape.experts)
        return LoadStep(
            time_s=step.time_s,
            prefill_rows=rows,
            decode_rows=len(step.prefill) - rows,
            running=len(step.running),
            waiting=step.waiting,
            waiting_tokens=step.waiting_tokens,
            prompt_left=int(step.prompt_left.sum()),
            token_budget=step.token_budget,
            max_sequences=step.max_sequences,
            prefill_counts=prefill.reshape(shape).astype(np.int32),
            decode_counts=decode.reshape(shape).astype(np.int32),
            look_ahead=step.look_ahead,
            signals=signals.reshape(len(SIGNALS), *shape),
            signal_rows=signal_rows,
            foreseen=foreseen.reshape(shape),
        )

    def _learn(self) -> None:
        """From the rows of the last steps, all at once: nobody has asked since."""
        if not self._fresh:
            return
        rows = RoutedRows.joined(self._fresh)
        self._fresh = []
        if len(rows):
            self._affinity.learn(rows.tokens, rows.cells, rows.follows)
            self._sequences.learn(rows)

    def _foreseen(self, step: StepRouting) -> npt.NDArray[np.float32]:
        if not self._oracle or not len(step.token_ids):
            return np.zeros(self._cells, np.float32)
        self._learn()
        found, unknown = self._affinity.expect(step.token_ids.astype(np.int64), follows=follows_in(step))
        mean = self._prompt_mean if step.prefill.any() else self._decode_mean
        return np.asarray(found + unknown * mean, np.float32)

    def _count(
        self, cells: npt.NDArray[np.int64], prefill: npt.NDArray[np.bool_], rows: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Rows per cell, of prompts and of answers."""
        everything = np.bincount(cells.ravel(), minlength=self._cells)
        if rows == len(prefill):
            return everything, np.zeros_like(everything)
        decode = np.bincount(cells[~prefill].ravel(), minlength=self._cells) if rows else everything
        return everything - decode, decode

    def _learn_means(
        self, prefill: npt.NDArray[np.int64], prefill_rows: int, decode: npt.NDArray[np.int64], decode_rows: int
    ) -> None:
        for mean, counts, rows in (
            (self._prompt_mean, prefill, prefill_rows),
            (self._decode_mean, decode, decode_rows),
        ):
            keep = np.exp(-rows / _MEAN_MEMORY)
            mean *= keep
            mean += counts * ((1 - keep) / max(rows, 1))

    def _signals(self, step: StepRouting, prefill_rows: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Afresh if it is time to; where that would cost a step too much, what is left of those of the last time."""
        self._wait -= 1
        self._queue.passed += prefill_rows
        if self._wait <= 0:
            self._learn()
            looked_up = max(_LOOKED_UP, self._waited) * self._worth // self._cells
            self._queue.look(step, self._prompt_mean, max(looked_up, 1))
            self._sequences.set_mean(self._decode_mean)
            decoding, decoding_rows = self._sequences.decoding()
            prompts, prompt_rows = self._sequences.prompts()
            rows = np.concatenate([decoding_rows, [prompt_rows]]).astype(np.float32)
            self._running_signals = np.concatenate([decoding, prompts[None]]), rows
            work = _PASSES * (len(step.queue) + 2 * len(step.running)) * self._cells + _CELLS_ANYWAY
            self._wait = self._waited = -(-work // self._worth)
        elif sum(map(len, self._fresh)) > _MOST_KEPT:
            self._learn()
        queue, queue_rows = self._queue.spans()
        rows = np.concatenate([queue_rows, self._running_signals[1]])
        signals = np.concatenate([queue, self._running_signals[0]])
        signals /= (np.maximum(rows, 1e-9) * self.shape.top_k)[:, None]
        return signals, rows
