"""The scheduler's arithmetic: how many rows come while it goes on as it does, requests arriving as they did lately.

A flow of sequences, not each of them: those that run decode and end, their places go to those that wait, whose prompts
get what decoding leaves of each step's budget; what arrives joins the queue. In a few pieces of the horizon at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from predictor.features import SCALARS
from predictor.horizon import Horizon

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

_PIECES = 16
_NEAR = 16  # steps that the signal ``decode_near`` looks ahead
_PROMPT = 200.0  # tokens of a prompt, before any has waited
_HAZARD = 0.02  # part of the running sequences that a step ends, before any has run
_HAZARDS = np.concatenate([[1e-6], np.geomspace(1e-4, 1.0, 60)])
_NEAR_OF_HAZARD = (1 - (1 - _HAZARDS) ** _NEAR) / (_NEAR * _HAZARDS)


@dataclass(frozen=True)
class Rows:
    """Rows expected of n moments: of prompts, of answers that run already, of answers that do not."""

    prefill: Floats
    running: Floats
    fresh: Floats


@dataclass(frozen=True)
class Pace:
    """What a step takes: some seconds, and some for each row of prompts and of answers."""

    step_s: float
    prefill_s: float
    decode_s: float

    @classmethod
    def fit(cls, scalars: Array) -> Pace:
        """From the averages in `scalars` [n, SCALARS]."""
        lately = [scalars[:, SCALARS.index(f"{kind}:16")] for kind in ("prefill_rows", "decode_rows")]
        inputs = np.stack([np.ones(len(scalars)), *lately], axis=1).astype(np.float64)
        return cls(*nnls(inputs, scalars[:, SCALARS.index("step_s")].astype(np.float64))[0].tolist())

    def of(self, prefill: Floats, decode: Floats) -> Floats:
        """Seconds of steps of so many rows."""
        return np.asarray(self.step_s + self.prefill_s * prefill + self.decode_s * decode)


def rows_to_come(scalars: Array, horizon: Horizon, pace: Pace) -> Rows:
    """Rows of the horizon for each of n moments' `scalars` [n, SCALARS]."""
    flow = _Flow(scalars, pace)
    total = Rows(*(np.zeros(len(scalars)) for _ in range(3)))
    for _ in range(_PIECES):
        steps = np.full(len(scalars), horizon.steps / _PIECES) if horizon.steps else None
        piece = flow.pass_by(steps, horizon.seconds / _PIECES)
        total = Rows(total.prefill + piece.prefill, total.running + piece.running, total.fresh + piece.fresh)
    return total


class _Flow:
    """Sequences and prompt tokens at one time, as real numbers; [n] each."""

    def __init__(self, scalars: Array, pace: Pace) -> None:
        def scalar(name: str) -> Floats:
            return scalars[:, SCALARS.index(name)].astype(np.float64)

        self._budget, self._places = scalar("token_budget"), scalar("max_sequences")
        self._started, self._waiting = scalar("prompt_left"), scalar("waiting_tokens")
        self._sequences = scalar("running")
        self._running = np.maximum(self._sequences - (self._started > 0), 0)
        self._fresh = np.zeros(len(scalars))
        self._prompt = self._prompt_tokens(scalar)
        near, far = scalar("rows:decode_near"), scalar("rows:decode_far")
        spoken = (near > 0) & (self._running > 0)
        part = np.where(spoken, near / np.maximum(_NEAR * self._running, 1), 1).clip(0, 1)
        self._ends = np.where(spoken, np.interp(part, _NEAR_OF_HAZARD[::-1], _HAZARDS[::-1]), _HAZARD)
        self._fresh_ends = np.where(spoken, self._running / np.maximum(far, 1), _HAZARD).clip(1e-3, 1)
        self._pace = pace
        lately_s = pace.of(scalar("prefill_rows:16"), scalar("decode_rows:16"))
        self._slower = (scalar("step_s") / np.maximum(lately_s, 1e-9)).clip(0.2, 5)
        self._step_s = np.maximum(scalar("step_s"), 1e-4)
        self._arrivals = (scalar("arrived:64") / np.maximum(scalar("passed_s:64"), 1e-4)).clip(0)

    def _prompt_tokens(self, scalar: Callable[[str], Floats]) -> Floats:
        """Of one prompt, on average: of those that wait, or else of those that waited lately."""
        waited = scalar("waiting:256")
        lately = np.where(waited > 0.05, scalar("waiting_tokens:256") / np.maximum(waited, 0.05), _PROMPT)
        now = self._waiting / np.maximum(scalar("waiting"), 1)
        return np.asarray(np.where(scalar("waiting") > 4, now, lately).clip(1))

    def pass_by(self, steps: Floats | None, seconds: float) -> Rows:
        """What is computed in so many steps, or within so many seconds."""
        if steps is None:
            steps, arrived = self._steps_within(seconds), self._arrivals * seconds
        else:
            self._steps_within(steps * self._step_s)
            arrived = self._arrivals * steps * self._step_s
            arrived += self._prompt * np.exp(-self._sequences - self._waiting / self._prompt) * (steps > 0)
        started, admitted, ended = self._taken(steps, arrived)
        begun = (started + admitted) / self._prompt
        left, fresh_left = (1 - self._ends) ** steps, (1 - self._fresh_ends) ** steps
        running = self._running * (1 - left) / self._ends
        fresh = self._fresh * (1 - fresh_left) / self._fresh_ends + begun * np.maximum(steps - 1, 0) / 2
        self._started = self._started - started
        self._waiting = self._waiting + arrived - admitted
        self._sequences = np.maximum(self._sequences + admitted / self._prompt - ended, 0)
        self._running = self._running * left
        self._fresh = np.minimum(self._fresh * fresh_left + begun, np.maximum(self._places - self._running, 0))
        return Rows(started + admitted, running, fresh)

    def _taken(self, steps: Floats, arrived: Floats) -> tuple[Floats, Floats, Floats]:
        """Tokens of prompts that have begun, tokens of others, and sequences that end, in so many steps."""
        room = steps * np.maximum(self._budget - self._running - self._fresh, 0)
        ended = self._running * (1 - (1 - self._ends) ** steps) + self._fresh * (1 - (1 - self._fresh_ends) ** steps)
        free = np.maximum(self._places - self._sequences + ended, 0)
        started = np.minimum(self._started, room)
        admitted = np.minimum(np.minimum(self._waiting + arrived, room - started), free * self._prompt)
        return started, admitted, ended

    def _steps_within(self, seconds: float | Floats) -> Floats:
        """Steps that fit: the more rows they have, the fewer."""
        for _ in range(2):
            steps = seconds / self._step_s
            started, admitted, _ = self._taken(steps, self._arrivals * seconds)
            step_s = self._pace.of((started + admitted) / np.maximum(steps, 1e-9), self._running + self._fresh)
            self._step_s = np.maximum(self._slower * step_s, 1e-4)
        return np.asarray(seconds / self._step_s)
