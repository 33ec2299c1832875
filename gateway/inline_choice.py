"""What rows cost here and over the wire, as learned from every layer, and which of them is cheaper."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.assignment import Part
from placement.cost import CallFit, Speed, SpeedFit

_CALL_S = 0.0005
"""A frame there and back, two wake-ups."""


class InlineChoice:
    """Learns both costs; with `prefer` (the policy `gateway.inline: prefer`) it chooses between them.

    Called by the engine's thread; others may read what was learned.
    """

    def __init__(self, speed: Speed, *, prefer: bool = True) -> None:
        """`speed` is believed in until something was measured."""
        self.inline = SpeedFit(speed)
        self.call = CallFit(_CALL_S)
        self.replicas = speed
        """That of the replicas; whoever knows better sets it."""
        self._prior = speed
        self._prefer = prefer

    def here(self, remote: Sequence[Sequence[Part]], inline: Sequence[Part]) -> bool:
        """Whether it is faster to compute all parts here than to send those of each replica there."""
        if not self._prefer:
            return False
        everything = [part for parts in remote for part in parts] + list(inline)
        if self._inline_s(everything) <= self.call.seconds + self._remote_s(remote) + self._inline_s(inline):
            self.call.forget()
            return True
        return False

    def was_here(self, parts: Sequence[Part], seconds: float) -> None:
        """What computing `parts` took."""
        self.inline.observe([part.rows for part in parts], seconds)

    def was_there(self, remote: Sequence[Sequence[Part]], seconds: float) -> None:
        """What calls to replicas took, the slowest included."""
        self.call.observe(self._remote_s(remote), seconds)

    def _inline_s(self, parts: Sequence[Part]) -> float:
        return (self.inline.speed or self._prior).seconds(part.rows for part in parts)

    def _remote_s(self, remote: Sequence[Sequence[Part]]) -> float:
        return max((self.replicas.seconds(part.rows for part in parts) for parts in remote), default=0.0)
