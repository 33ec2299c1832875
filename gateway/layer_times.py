"""How long MoE layers take: from the router's choice to the summed rows. A histogram of fine, fixed buckets."""

from __future__ import annotations

import math

_FIRST_S, _RATIO, _BUCKETS = 1e-5, 1.1, 152

EDGES = tuple(_FIRST_S * _RATIO**i for i in range(_BUCKETS))
"""Upper ends of the buckets, seconds: 10 us to 18 s; what took longer counts in the last."""

_SCALE = 1 / math.log(_RATIO)


class LayerTimes:
    """Calls by duration, all layers together. Kept by the engine's thread, read by any."""

    def __init__(self) -> None:
        self.counts = [0] * _BUCKETS
        self.seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Count a layer that took so long."""
        place = math.ceil(math.log(max(seconds, _FIRST_S) / _FIRST_S) * _SCALE)
        self.counts[min(place, _BUCKETS - 1)] += 1
        self.seconds += seconds


def quantile(counts: list[int], part: float) -> float | None:
    """Seconds that `part` of the calls did not exceed, to within a bucket's 10 %; None of no calls."""
    left = part * sum(counts)
    for count, below, edge in zip(counts, (0.0, *EDGES), EDGES, strict=False):
        if count and left <= count:
            return below + (edge - below) * left / count
        left -= count
    return None
