"""What is known about the rows to come, kept up to date step by step.

Three sources: the tokens that wait for prefill, through what is known of each token's experts (early layers route
mostly by token identity); the running sequences, which decode much as they did so far; the prompts that have begun.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from predictor.load_step import SIGNALS, LoadStep
from predictor.queue_ahead import QueueAhead
from predictor.routing import StepRouting
from predictor.sequences import RunningSequences
from predictor.shape import ModelShape
from predictor.token_affinity import TokenAffinity

_MEAN_MEMORY = 2000.0  # rows
# What a step may cost, in cells of tables looked up: so many for each layer, of which a fresh look takes some anyway.
_CELLS_PER_LAYER, _CELLS_ANYWAY = 8_000, 20_000
_MOST_LEARNED = 60_000  # choices of a step; from longer ones every n-th row is learned


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
        self._queue = QueueAhead(self._affinity)
        self._running_signals: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
        self._wait = 0
        self._offsets = (np.arange(len(shape.layers)) * shape.experts)[:, None, None]

    def observe(self, step: StepRouting) -> LoadStep:
        """Learn what `step` routed; its load, and what is known after it."""
        cells = (self._offsets + step.experts).transpose(1, 0, 2).reshape(len(step.token_ids), self._chosen)
        decode = self._count(cells[~step.prefill])
        prefill = self._count(cells) - decode
        rows = int(step.prefill.sum())
        self._learn_means(prefill, rows, decode, len(step.prefill) - rows)
        learned = slice(None, None, max(1, -(-cells.size // _MOST_LEARNED)))
        foreseen = self._foreseen(step)
        tokens = step.token_ids[learned].astype(np.int64)
        self._affinity.learn(tokens, cells[learned], _follows(step)[learned])
        self._sequences.set_mean(self._decode_mean)
        self._sequences.observe(step, cells, learned)
        signals, signal_rows = self._signals(step)
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

    def _foreseen(self, step: StepRouting) -> npt.NDArray[np.float32]:
        tokens = step.token_ids.astype(np.int64)
        if not self._oracle or not len(tokens):
            return np.zeros(self._cells, np.float32)
        rows, unknown, _ = self._affinity.expect(tokens, [len(tokens)], int(step.prefill.sum()))
        mean = self._prompt_mean if step.prefill.any() else self._decode_mean
        return np.asarray(rows[0] + unknown[0] * mean, np.float32)

    def _count(self, cells: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.bincount(cells.ravel(), minlength=self._cells)

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

    def _signals(self, step: StepRouting) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Afresh if it is time to; where that would cost a step too much, what is left of those of the last time."""
        self._wait -= 1
        self._queue.passed += int(step.prefill.sum())
        if self._wait <= 0:
            self._queue.look(step, self._prompt_mean)
            decoding, decoding_rows = self._sequences.decoding()
            prompts, prompt_rows = self._sequences.prompts()
            rows = np.concatenate([decoding_rows, [prompt_rows]]).astype(np.float32)
            self._running_signals = np.concatenate([decoding, prompts[None]]), rows
            work = (self._queue.looked_up + 2 * len(step.running)) * self._cells + _CELLS_ANYWAY
            self._wait = -(-work // (_CELLS_PER_LAYER * len(self.shape.layers)))
        queue, queue_rows = self._queue.spans()
        rows = np.concatenate([queue_rows, self._running_signals[1]])
        signals = np.concatenate([queue, self._running_signals[0]])
        signals /= (np.maximum(rows, 1e-9) * self.shape.top_k)[:, None]
        return signals, rows


def _follows(step: StepRouting) -> npt.NDArray[np.bool_]:
    """Which rows [R] come right after the row before them in a prompt."""
    follows = np.zeros(len(step.prefill), bool)
    follows[1:] = step.prefill[1:] & (step.sequences[1:] == step.sequences[:-1])
    return follows
