"""How long one replica takes for its calls, lately, beside what a cost model expects; and a deadline from it."""

from __future__ import annotations

import collections
import math

_KEPT = 64
_FEWEST = 8
"""Calls before anything is said."""
_EVERY = 8
"""Calls between two sortings: an answer must cost next to nothing."""
_QUANTILE = 0.95
_FACTOR = 3.0
_MARGIN_S = 0.005
"""What the machine's scheduler may take at any time, however short the call."""


class Latency:
    """The last calls of one replica, each as a multiple of what it should have taken."""

    __slots__ = ("_calls", "_high", "_median", "_recent")

    def __init__(self) -> None:
        self._recent: collections.deque[float] = collections.deque(maxlen=_KEPT)
        self._calls = 0
        self._median = self._high = math.nan

    def observe(self, seconds: float, expected_s: float) -> None:
        """A call that should have taken `expected_s` (above 0) took `seconds`."""
        self._recent.append(seconds / expected_s)
        self._calls += 1
        if self._calls == _FEWEST or self._calls % _EVERY == 0:
            ordered = sorted(self._recent)
            self._median = ordered[len(ordered) // 2]
            self._high = ordered[math.ceil(_QUANTILE * len(ordered)) - 1]

    @property
    def pace(self) -> float | None:
        """The median multiple; None while too little is known."""
        return self._median if self._calls >= _FEWEST else None

    def deadline(self, expected_s: float, limit_s: float) -> float:
        """Seconds after which a call that should take `expected_s` is late, `limit_s` at most."""
        if self._calls < _FEWEST:
            return limit_s
        return min(limit_s, _FACTOR * self._high * expected_s + _MARGIN_S)
