"""What an operator may want of scaling and placement."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class PlacementSettings:
    """How the scaler and the placer weigh time against memory and moves."""

    gib_worth: float = 0.0
    """What keeping one GiB resident costs, in seconds of waiting a second. 0: memory within the budget is free, and
    nothing goes to zero."""
    hysteresis: float = 0.2
    """A slice that is held goes to zero only when it is worth less than this part below the price of keeping it."""
    imbalance: float = 1.02
    """Slowest device over the fastest that the layer could be with the memory there is: more is repaired."""
    min_copies: int = 0
    """Copies that every slice keeps, also without rows."""
    max_copies: int = 1 << 30
    """Most copies of one slice."""
    spread_above: float | None = 1.0
    """Slices with more than this times their layer's mean work get copies on two nodes, where there are two; None:
    no such copies."""
    max_moved_bytes: int | None = None
    """Most bytes to load in one round; None: no bound."""
    repairs: int = 6
    """Rounds of evening out the busiest devices, at most."""
