"""How many replicas each unit should have, from round to round. Pure.

Up at once, where it is worth it; down only to what was wanted at most during a whole cool-down (as Kubernetes'
autoscaler does): a load that comes back finds its replicas. Moving rows between live replicas needs no such patience.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from placement.arrays import Bools, Ints


class Counts:
    """Remembers what was wanted."""

    def __init__(self, start: Ints) -> None:
        self.now = start
        """[U] replicas of each unit, as asked of Serve."""
        self._wanted: deque[tuple[float, Ints]] = deque()
        self._down_at: list[float] = []

    def follow(
        self, now_s: float, wanted: Ints, *, least: Ints, most: Ints, worth: Bools, idle: Bools, cool_down_s: float
    ) -> Ints:
        """[U] replicas from now on, between `least` and `most`.

        `wanted` more than there are count where they are `worth` it; fewer count at once where a unit is `idle`.
        """
        if not self._down_at:
            self._down_at = [now_s] * len(wanted)
        wanted = np.clip(wanted, least, most)
        before = np.clip(self.now, least, most)
        self._wanted.append((now_s, wanted))
        while now_s - self._wanted[0][0] > cool_down_s:
            self._wanted.popleft()
        high = np.max([each for _, each in self._wanted], axis=0)
        rested = now_s - np.array(self._down_at) >= cool_down_s
        lower = np.where(idle, wanted, np.where(rested, np.clip(high, least, most), before))
        after = np.where(wanted > before, np.where(worth, wanted, before), np.minimum(before, lower))
        self._down_at = np.where(after < self.now, now_s, self._down_at).tolist()
        self.now = after.astype(np.int64)
        return self.now
