"""Features of each (layer, expert) at one moment: what history tells, and what it does not know.

The same code reads a live stream and a recording, step by step, so that what is learned from is what is forecast with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from predictor.load_step import SIGNALS, LoadStep
from predictor.shape import ModelShape

HALF_LIVES = (4, 16, 64, 256, 1024)
"""Of the averages, in steps."""

_PACES = ("prefill_rows", "decode_rows", "passed_s", "arrived", "waiting", "waiting_tokens", "busy_s")
"""What is averaged over steps."""

SCALARS = (
    *(f"rows:{name}" for name in SIGNALS),
    "running",
    "waiting",
    "waiting_tokens",
    "prompt_left",
    "token_budget",
    "max_sequences",
    "last_prefill_rows",
    "last_decode_rows",
    *(f"{kind}:{steps}" for kind in _PACES for steps in HALF_LIVES),
    "step_s",
)
"""What is the same for all layers and experts. ``arrived`` are prompt tokens, ``passed_s`` seconds with those in which
nothing ran, ``step_s`` without."""

_SLOW = HALF_LIVES[1:]
SHARES = (
    "last",
    "look_ahead",
    *(f"average:{steps}" for steps in HALF_LIVES),
    *(f"prefill:{steps}" for steps in _SLOW),
    *(f"decode:{steps}" for steps in _SLOW),
    *SIGNALS,
)
"""Estimates of the coming shares, each from one source alone; where a source is silent, what comes nearest to it."""


@dataclass(frozen=True, slots=True)
class Moment:
    """What is known at one moment."""

    scalars: npt.NDArray[np.float32]
    """[`SCALARS`]"""
    shares: npt.NDArray[np.float32]
    """[`SHARES`, L, E]: non-negative, sums of one for each layer"""


class History:
    """Averages of the load so far, and what the last step told."""

    def __init__(self, shape: ModelShape) -> None:
        self._layers, self._experts = len(shape.layers), shape.experts
        keep = 0.5 ** (1 / np.array(HALF_LIVES, np.float32))
        self._keep, self._keep_scalars = keep[:, None, None, None], keep[:, None]
        self._counts = np.zeros((len(HALF_LIVES), 3, self._layers, self._experts), np.float32)
        self._rows = np.zeros((len(HALF_LIVES), len(_PACES)), np.float32)
        self._weight = np.zeros((len(HALF_LIVES), 1), np.float32)
        self._last: LoadStep | None = None

    def observe(self, step: LoadStep) -> None:
        """Add one step."""
        paces = self._paces(step)
        self._counts *= self._keep
        self._counts += np.stack([step.prefill_counts, step.decode_counts, step.look_ahead])
        self._rows *= self._keep_scalars
        self._rows += paces
        self._weight *= self._keep_scalars
        self._weight += 1
        self._last = step

    def moment(self) -> Moment:
        """What is known after the last step; raise ValueError before the first."""
        if self._last is None:
            raise ValueError("nothing is known before the first step")
        return Moment(self._scalars(self._last), self._shares(self._last))

    def _paces(self, step: LoadStep) -> tuple[float, ...]:
        last = self._last
        passed = busy = arrived = 0.0
        if last is not None:
            passed = busy = step.time_s - last.time_s
            if not last.running and not last.waiting:  # nothing ran for a while
                busy = min(passed, float(self._rows[1, -1] / max(self._weight[1, 0], 1)))
            before = last.waiting_tokens + last.prompt_left
            arrived = step.prefill_rows + step.waiting_tokens + step.prompt_left - before
        return step.prefill_rows, step.decode_rows, passed, arrived, step.waiting, step.waiting_tokens, busy

    def _scalars(self, last: LoadStep) -> npt.NDArray[np.float32]:
        mean = self._rows / np.maximum(self._weight, 1)
        numbers = (last.running, last.waiting, last.waiting_tokens, last.prompt_left, last.token_budget)
        rows = (last.max_sequences, last.prefill_rows, last.decode_rows)
        return np.concatenate([last.signal_rows, (*numbers, *rows), mean.T.ravel(), mean[1:2, -1]], dtype=np.float32)

    def _shares(self, last: LoadStep) -> npt.NDArray[np.float32]:
        prefill, decode, ahead = self._counts[:, 0], self._counts[:, 1], self._counts[:, 2]
        averages = self._slowest_first(prefill + decode)
        prompts, answers = _shares_or(prefill[1:], averages[1:]), _shares_or(decode[1:], averages[1:])
        fallbacks = {"queue": prompts[1], "decode": answers[1], "prompt": prompts[1]}
        signals = [_shares_or(last.signals[i], fallbacks[name.partition("_")[0]]) for i, name in enumerate(SIGNALS)]
        step = _shares_or((last.prefill_counts + last.decode_counts).astype(np.float32), averages[0])
        look_ahead = _shares_or(ahead[0], averages[0])
        return np.concatenate([step[None], look_ahead[None], averages, prompts, answers, np.stack(signals)])

    def _slowest_first(self, counts: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Averages as shares; where a fast one is empty the next slower stands in, where all are an even load does."""
        shares = np.empty_like(counts)
        fallback = np.full(counts.shape[1:], 1 / self._experts, np.float32)
        for i in reversed(range(len(counts))):
            fallback = shares[i] = _shares_or(counts[i], fallback)
        return shares


def _shares_or(counts: npt.NDArray[np.float32], fallback: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """`counts` [..., E] as shares; `fallback` where there are none to speak of."""
    total = counts.sum(axis=-1, keepdims=True)
    return np.where(total > 1e-3, counts / np.maximum(total, 1e-3), fallback).astype(np.float32)
