"""What is known about the rows to come, kept up to date step by step.

Three sources: the tokens that wait for prefill, through what is known of each token's experts (early layers route
mostly by token identity); the running sequences, which decode much as they did so far; the prompts that have begun.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from predictor.affinity import Affinity
from predictor.load_step import SIGNALS, LoadStep
from predictor.routing import StepRouting
from predictor.sequences import RunningSequences
from predictor.shape import ModelShape

_SPANS = (1, 4, 16)  # token budgets
_PRIOR_ROWS = 2.0
_MEAN_MEMORY = 2000.0  # rows


class LoadSignals:
    """Turns each step's routing into a `LoadStep`, and learns from it."""

    def __init__(self, shape: ModelShape, *, max_bytes: int = 64 << 20) -> None:
        """`max_bytes` bounds the memory of the affinity table."""
        self.shape = shape
        self._cells = len(shape.layers) * shape.experts
        self._chosen = len(shape.layers) * shape.top_k
        self._affinity = Affinity(shape.vocabulary, self._cells, max_bytes=max_bytes)
        self._sequences = RunningSequences(self._cells)
        self._prompt_mean = np.full(self._cells, shape.top_k / shape.experts, np.float32)
        self._decode_mean = self._prompt_mean.copy()
        self._offsets = (np.arange(len(shape.layers)) * shape.experts)[:, None, None]

    def observe(self, step: StepRouting) -> LoadStep:
        """Learn what `step` routed; its load, and what is known after it."""
        cells = (self._offsets + step.experts).transpose(1, 0, 2).reshape(len(step.token_ids), self._chosen)
        prefill, decode = self._count(cells[step.prefill]), self._count(cells[~step.prefill])
        rows = int(step.prefill.sum())
        self._learn_means(prefill, rows, decode, len(step.prefill) - rows)
        self._affinity.learn(self._affinity.bucket(step.token_ids.astype(np.int64)), cells)
        self._sequences.set_mean(self._decode_mean)
        self._sequences.observe(step, cells)
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
            prefill_counts=prefill.reshape(shape).astype(np.int32),
            decode_counts=decode.reshape(shape).astype(np.int32),
            look_ahead=step.look_ahead,
            signals=signals.reshape(len(SIGNALS), *shape),
            signal_rows=signal_rows,
        )

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
        queue, queue_rows = self._queue(step)
        decoding, decoding_rows = self._sequences.decoding()
        prompts, prompt_rows = self._sequences.prompts()
        signals = np.concatenate([queue, decoding, prompts[None]])
        rows = np.concatenate([queue_rows, decoding_rows, [prompt_rows]]).astype(np.float32)
        return signals / (np.maximum(rows, 1e-9) * self.shape.top_k)[:, None], rows

    def _queue(self, step: StepRouting) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Rows per cell of what fills the next budgets [spans, cells], and how many rows that is [spans]."""
        buckets = self._affinity.bucket(step.queued_tokens[: _SPANS[-1] * step.token_budget].astype(np.int64))
        ends = [min(span * step.token_budget, len(buckets)) for span in _SPANS]
        distinct, where = np.unique(buckets, return_inverse=True)
        counts = np.stack([np.bincount(where[:end], minlength=len(distinct)) for end in ends]).astype(np.float32)
        rows, unknown = self._affinity.expect(distinct, counts, _PRIOR_ROWS)
        return rows + unknown[:, None] * self._prompt_mean, np.array(ends, np.float32)
