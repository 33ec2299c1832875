"""How fast places in the batch come free."""

from __future__ import annotations

_WEIGHT = 0.1
_SHORTEST_S, _LONGEST_S = 1.0, 60.0
"""OpenAI's clients do not obey a longer `Retry-After` than a minute."""


class Pace:
    """Follows how long sequences keep their place (an exponential average, so that old traffic is forgotten)."""

    def __init__(self) -> None:
        self._stay_s = 1.0

    def left(self, stay_s: float) -> None:
        """Note that a sequence gave its place up after `stay_s` seconds."""
        self._stay_s += _WEIGHT * (stay_s - self._stay_s)

    def wait_s(self, waiting: int, places: int) -> float:
        """Seconds, within 1 and 60, until each of `waiting` sequences has had one of `places` places."""
        return min(max(waiting * self._stay_s / places, _SHORTEST_S), _LONGEST_S)
