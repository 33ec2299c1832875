"""What an operator may want of scaling and placement."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from placement.arrays import Ints
from placement.cost import Speed

GIB = 1 << 30

Method = Literal["evermoe", "static", "eplb", "eplb-hierarchical", "moeless", "oracle"]


@dataclass(frozen=True, slots=True, eq=False)
class PlacementSettings:
    """How the scaler and the placer weigh time against memory and moves."""

    gib_worth: float = 0.0
    """What keeping one GiB resident costs, in seconds of waiting a second. 0: memory within the budget is free, and
    nothing goes to zero."""
    max_bytes: int | None = None
    """What all copies together may take; None: what fits on the devices."""
    hysteresis: float = 0.2
    """A slice that is held goes to zero only when it is worth less than this part below the price of keeping it."""
    imbalance: float = 1.02
    """Slowest device over the fastest that the layer could be with the memory there is: more is repaired."""
    min_copies: int | Ints = 0
    """Copies that every slice keeps, also without rows; one number, or [L, E]."""
    max_copies: int | Ints = 1 << 30
    """Most copies of one slice; one number, or [L, E]."""
    spread_above: float | None = 1.0
    """Slices with more than this times their layer's mean work get copies on two nodes, where there are two; None:
    no such copies."""
    max_moved_bytes: int | None = None
    """Most bytes to load in one round; None: no bound."""
    repairs: int = 6
    """Rounds of evening out the busiest devices, at most."""


@dataclass(frozen=True, slots=True)
class Override:
    """Other bounds for some slices."""

    experts: Collection[int] | None = None
    """None: all."""
    layers: Collection[int] | None = None
    """Their numbers in the model; None: all."""
    min_replicas: int | None = None
    max_replicas: int | None = None
    pin: bool = False
    """At least one copy stays resident, however idle or dear."""


@dataclass(frozen=True, slots=True, eq=False)
class RoundSettings:
    """What one planning round is told by the operator's policy."""

    method: Method = "evermoe"
    placement: PlacementSettings = field(default_factory=PlacementSettings)
    """Without `min_copies` and `max_copies`, which follow from the bounds below. Without `max_bytes`, all copies may
    take what `replicas` of each unit take (one, if none are to start with)."""
    replicas: int = 1
    """Of each unit, to start with."""
    min_replicas: int = 0
    max_replicas: int = 8
    overrides: tuple[Override, ...] = ()
    """Later ones win."""
    replica_bytes: int | None = None
    """What one replica's slices may take; None: its whole unit."""
    headroom: bool = True
    """Plan for the rows that are exceeded one time in ten, rather than for those expected."""
    idle_to_zero_s: float = 300.0
    """A slice without a row for so long keeps its least copies only."""
    cool_down_s: float = 10.0
    """A unit's count goes down when fewer were enough for so long, and not sooner after it went down last."""
    device: Speed | None = None
    """A replica's declared speed: where nothing has been measured yet. None: a gateway's."""
    near_s: float = 0.3e-3
    """What a call on the gateway's own host costs beside its rows ..."""
    far_s: float = 0.8e-3
    """... and one across the network."""

    @property
    def elastic(self) -> bool:
        """Our own method, which knows memory's price and idleness; others keep every expert for ever."""
        return self.method in ("evermoe", "oracle")
