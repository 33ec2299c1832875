"""How the tokens that wait will be routed: looked up now and then, and moved on with the queue in between."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from predictor.load_step import QUEUE_SPANS
from predictor.routing import StepRouting
from predictor.token_affinity import TokenAffinity

_MARKS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 48, 64)  # budgets, between which rows are taken to be alike
_IN_PAIRS = 16  # budgets whose tokens are looked up in pairs

Floats = npt.NDArray[np.float32]


class QueueAhead:
    """Rows to be expected of the queue's first tokens, for each of `QUEUE_SPANS`."""

    def __init__(self, affinity: TokenAffinity) -> None:
        self._affinity = affinity
        self.passed = 0
        """Prompt rows computed since the last look; whoever observes the steps adds them."""
        self.looked_up = 0
        """Rows of tables that the last look took."""

    def look(self, step: StepRouting, otherwise: Floats) -> None:
        """Look up what waits after `step`; rows of tokens that nobody knows go as `otherwise` [cells] says."""
        budget = step.token_budget
        tokens = step.queued_tokens[: _MARKS[-1] * budget].astype(np.int64)
        ends = [min(mark * budget, len(tokens)) for mark in _MARKS]
        rows, unknown, self.looked_up = self._affinity.expect(tokens, ends, _IN_PAIRS * budget)
        self._ends = np.array([0, *ends], np.float32)
        self._rows = np.zeros((len(ends) + 1, len(otherwise)), np.float32)
        self._rows[1:] = rows + unknown[:, None] * otherwise
        self._lengths = np.array(QUEUE_SPANS, np.float32) * budget
        self.passed = 0

    def spans(self) -> tuple[Floats, Floats]:
        """Rows per cell of what fills the next budgets [spans, cells], and how many rows [spans]."""
        last = self._ends[-1]
        start = np.minimum(np.float32(self.passed), last)
        ends = np.minimum(start + self._lengths, last)
        if not self.passed:
            marks = np.searchsorted(self._ends, ends)
            return self._rows[marks], ends
        points = np.concatenate([[start], ends])
        right = np.searchsorted(self._ends, points).clip(1, len(self._ends) - 1)
        inside = (points - self._ends[right - 1]) / np.maximum(self._ends[right] - self._ends[right - 1], 1)
        sums = self._rows[right - 1] * (1 - inside)[:, None] + self._rows[right] * inside[:, None]
        return np.maximum(sums[1:] - sums[0], 0).astype(np.float32), (ends - start).astype(np.float32)
