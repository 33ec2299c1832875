"""Whether a layer's rows are computed by the gateway although replicas would: the policy `gateway.inline: prefer`."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.assignment import Part
from placement.cost import Pace, Speed

_CALL_S = 0.0005
"""A frame there and back, two wake-ups."""


class InlineChoice:
    """Compares both ways by the cost model, and learns from every layer how wrong that is."""

    def __init__(self, speed: Speed) -> None:
        self._speed = speed
        self._here, self._there = Pace(), Pace()

    def here(self, remote: Sequence[Sequence[Part]], inline: Sequence[Part]) -> bool:
        """Whether it is faster to compute all parts here than to send those of each replica there."""
        everything = [part for parts in remote for part in parts] + list(inline)
        here = self._here.factor * self._inline_s(everything)
        there = self._there.factor * self._remote_s(remote) + self._here.factor * self._inline_s(inline)
        if here <= there:
            self._there.forget()
            return True
        return False

    def was_here(self, parts: Sequence[Part], seconds: float) -> None:
        """What computing `parts` took."""
        self._here.observe(self._inline_s(parts), seconds)

    def was_there(self, remote: Sequence[Sequence[Part]], seconds: float) -> None:
        """What calls to replicas took, the slowest included."""
        self._there.observe(self._remote_s(remote), seconds)

    def _inline_s(self, parts: Sequence[Part]) -> float:
        return self._speed.seconds(part.rows for part in parts)

    def _remote_s(self, remote: Sequence[Sequence[Part]]) -> float:
        return _CALL_S + max((self._inline_s(parts) for parts in remote), default=0.0)
