"""What a planning round sees: the load to come, and the replicas there are."""

from __future__ import annotations

from dataclasses import dataclass

from placement.arrays import Floats


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica as it announces itself."""

    id: str
    unit: str
    """Name of its expert unit: it may hold slices of no other."""
    node: str = ""
    """Ray's node: what it is lost with."""
    host: str = ""
    slices: frozenset[tuple[int, int]] = frozenset()
    """(layer's number in the model, expert) that are resident."""
    memory_bytes: int = 0
    """What its slices may take; 0: no bound."""
    read_s: float | None = None
    """Seconds to read one slice's weights, and to compute one row of it, as measured; None: not yet."""
    row_s: float | None = None
    near: bool = True
    """On a gateway's own host."""
    draining: bool = False
    """Told to go: it gets nothing any more."""
    started_at: float = 0.0
    """Seconds since the epoch."""


@dataclass(frozen=True, eq=False, slots=True)
class LoadView:
    """The load to come. L layers as `Round` was given them, E experts."""

    now_s: float
    """Seconds since the epoch; only differences and `Plan.made_at` are made of it."""
    rows: Floats
    """[L, E] rows expected within the horizon."""
    p90: Floats
    """[L, E] rows that are exceeded one time in ten."""
    horizon_s: float
    steps_per_s: float
    """Of all gateways together; 0: nothing runs."""
    idle_s: Floats
    """[L, E] seconds since each slice's last row."""
