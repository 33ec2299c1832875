"""How the tokens that wait will be routed: each prompt is looked up when it joins the queue, and moves on with it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from predictor.load_step import QUEUE_SPANS
from predictor.routing import StepRouting
from predictor.token_affinity import TokenAffinity

_OLD = 32  # looks after which one who still waits is looked up again
_LONG = 1 / 3  # what takes more than this part of the rows that a look may take ...
_SAMPLE = 1 / 32  # ... is looked up with so much of them

Floats = npt.NDArray[np.float32]


class QueueAhead:
    """Rows to be expected of the queue's first tokens, for each of `QUEUE_SPANS`."""

    def __init__(self, affinity: TokenAffinity, cells: int) -> None:
        self._affinity = affinity
        self._most = 0
        self._left = 0
        self._slots: dict[tuple[int, int], int] = {}  # (sequence, last token) -> row of the tables below
        self._free: list[int] = []
        self._rows = np.zeros((0, cells), np.float32)  # of one token, on average
        self._unknown = np.zeros(0, np.float32)  # what part of it nobody knows
        self._when: dict[int, int] = {}  # row of the tables -> number of the look it is of
        self._looks = 0
        self.passed = 0
        """Prompt rows computed since the last look; whoever observes the steps adds them."""

    def look(self, step: StepRouting, otherwise: Floats, most: int) -> None:
        """Look up who has joined, in at most about `most` rows of tables, over time.

        Rows of tokens that nobody knows go as `otherwise` [cells] says.
        """
        self._most = most
        self._follow(step)
        self._looks += 1
        self._left = min(self._left, 0) + self._most
        lengths = np.array([last - first for _, first, last in step.queue], np.float32)
        rows = np.empty((len(step.queue) + 1, len(otherwise)), np.float32)
        slots = [self._slot(step, sequence, last) for sequence, _, last in step.queue]
        place = np.array(slots, np.int64)
        known = place >= 0
        rows[0] = 0
        rows[1:] = otherwise
        rows[1:][known] *= self._unknown[place[known], None]
        rows[1:][known] += self._rows[place[known]]
        rows[1:] *= lengths[:, None]
        self._sums = np.cumsum(rows, axis=0, out=rows)
        self._ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.float32)
        self._spans = np.array(QUEUE_SPANS, np.float32) * step.token_budget
        self.passed = 0

    def spans(self) -> tuple[Floats, Floats]:
        """Rows per cell of what fills the next budgets [spans, cells], and how many rows [spans]."""
        if len(self._ends) == 1:
            return np.zeros((len(self._spans), self._sums.shape[1]), np.float32), np.zeros(len(self._spans), np.float32)
        last = self._ends[-1]
        start = min(np.float32(self.passed), last)
        points = np.concatenate([[start], np.minimum(start + self._spans, last)])
        right = np.searchsorted(self._ends, points).clip(1, len(self._ends) - 1)
        before = self._ends[right - 1]
        inside = ((points - before) / np.maximum(self._ends[right] - before, 1)).astype(np.float32)[:, None]
        sums = self._sums[right - 1] * (1 - inside) + self._sums[right] * inside
        return np.maximum(sums[1:] - sums[0], 0), (points[1:] - start).astype(np.float32)

    def _follow(self, step: StepRouting) -> None:
        """Whoever has left the queue gives up its place in the tables."""
        waiting = {(sequence, last) for sequence, _, last in step.queue}
        self._free += [self._slots.pop(gone) for gone in self._slots.keys() - waiting]

    def _slot(self, step: StepRouting, sequence: int, last: int) -> int:
        """Where the sequence's rows are; -1 where nothing can be looked up any more."""
        slot = self._slots.get((sequence, last), -1)
        if self._left > 0 and (slot < 0 or self._looks - self._when[slot] > _OLD):
            tokens = step.prompts[sequence][:last].astype(np.int64)
            cost = self._affinity.cost(len(tokens))
            if cost <= _LONG * self._most:
                rows, unknown = self._affinity.expect(tokens)
            else:
                cost = max(int(_SAMPLE * self._most), 1)
                rows, unknown = self._affinity.sampled(tokens, cost)
            self._left -= cost
            if slot < 0:
                slot = self._slots[sequence, last] = self._free.pop() if self._free else self._more()
            self._when[slot] = self._looks
            self._rows[slot], self._unknown[slot] = rows / len(tokens), unknown / len(tokens)
        return slot

    def _more(self) -> int:
        """Room for twice as many sequences; one of the new places."""
        had = len(self._rows)
        size = max(8, 2 * had)
        self._rows = np.concatenate([self._rows, np.zeros((size - had, self._rows.shape[1]), np.float32)])
        self._unknown = np.concatenate([self._unknown, np.zeros(size - had, np.float32)])
        self._free += range(had + 1, size)
        return had
