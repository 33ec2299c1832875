"""How many more tokens a running sequence will emit, learned from those that ended."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_LONGEST = 4096
_PRIOR_ENDS, _PRIOR_TOKENS = 0.5, 500.0  # as if seen before anything else: one early end in a thousand tokens
_BORROWED = 50.0  # tokens for which the mean over all lengths counts in each class


class RemainingLengths:
    """The chance to end early, by tokens emitted so far; old evidence fades with every ending.

    A request's limit bounds its length from above; how often sequences end before it is what is learned here: for each
    class of lengths (four to a doubling) early ends per token emitted (a discrete hazard).
    """

    def __init__(self, memory: int = 2000) -> None:
        """`memory`: about how many endings count."""
        self._classes = (4 * np.log2(1 + np.arange(_LONGEST + 1))).astype(np.int64)
        size = int(self._classes[-1]) + 1
        self._ends = np.zeros(size)
        self._tokens = np.zeros(size)
        self._keep = 1 - 1 / memory
        self._survival = np.ones(_LONGEST + 2)  # sums of the chances to get so far
        self._stale = True

    def observe(self, emitting: npt.NDArray[np.int64], early_ends: npt.NDArray[np.int64]) -> None:
        """Learn from a step: tokens so far of who emitted one more, and of who ended before the limit."""
        self._tokens += np.bincount(self._class(emitting), minlength=len(self._tokens))
        if len(early_ends):
            keep = self._keep ** len(early_ends)
            self._tokens *= keep
            self._ends *= keep
            self._ends += np.bincount(self._class(early_ends), minlength=len(self._ends))
            self._stale = True

    def expected(
        self, emitted: npt.NDArray[np.int64], limit: npt.NDArray[np.int64], horizon: int
    ) -> npt.NDArray[np.float64]:
        """Tokens to be expected within `horizon` steps of sequences that emitted so many and may emit `limit` more."""
        if self._stale:
            self._refresh()
        start = np.minimum(emitted, _LONGEST)
        end = np.minimum(start + np.minimum(limit, horizon), _LONGEST)
        alive = self._alive[start]
        return np.asarray((self._survival[end] - self._survival[start]) / alive)

    def _class(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self._classes[np.minimum(lengths, _LONGEST)]

    def _refresh(self) -> None:
        overall = (self._ends.sum() + _PRIOR_ENDS) / (self._tokens.sum() + self._ends.sum() + _PRIOR_TOKENS)
        hazard = (self._ends + _BORROWED * overall) / (self._tokens + self._ends + _BORROWED)
        self._alive = np.maximum(np.cumprod(1 - hazard[self._classes]), 1e-12)
        self._survival = np.concatenate([[0.0], np.cumsum(self._alive)])
        self._stale = False
