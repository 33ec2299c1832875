"""The plan: what the fleet of experts should look like. Immutable and versioned; published in the directory."""

from __future__ import annotations

import msgspec

DOCUMENT = "plan"
"""The plan's name in the directory."""


class Copy(msgspec.Struct, frozen=True, array_like=True):
    """A slice that a replica should hold."""

    layer: int
    """Its number in the model."""
    expert: int
    share: float
    """Part of the slice's rows; 0: in reserve."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How many replicas each unit should have, which slices each of them holds, and why."""

    epoch: int
    """Later plans have greater ones."""
    replicas: dict[str, int]
    """Unit name -> replicas; a unit that is not named keeps what it has."""
    copies: dict[str, list[Copy]] | None = None
    """Replica id -> slices it should hold and their shares; one that is not named holds nothing yet.

    None: every replica holds its whole unit, and rows are spread evenly.
    """
    levelled: bool = False
    """Whether gateways level the rows of each step over the copies with a share, rather than keep to the shares."""
    reason: str
    """Of the whole, for the operator, in words."""
    reasons: dict[str, str] = {}
    """Unit name -> why it has so many."""
    made_at: float = 0.0
    """Seconds since the epoch."""


def encode(plan: Plan) -> bytes:
    """The plan as JSON."""
    return msgspec.json.encode(plan)


def decode(document: bytes) -> Plan:
    """The plan of a JSON document; raise msgspec.DecodeError where it is none."""
    return msgspec.json.decode(document, type=Plan)
