"""The plan: what the fleet of experts should look like. Immutable and versioned; published in the directory."""

from __future__ import annotations

import msgspec

DOCUMENT = "plan"
"""The plan's name in the directory."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How many replicas each unit should have, and why."""

    epoch: int
    replicas: dict[str, int]
    """Unit name -> replicas; a unit that is not named keeps what it has."""
    reason: str
    """For the operator, in words."""


def encode(plan: Plan) -> bytes:
    """The plan as JSON."""
    return msgspec.json.encode(plan)


def decode(document: bytes) -> Plan:
    """The plan of a JSON document; raise msgspec.DecodeError where it is none."""
    return msgspec.json.decode(document, type=Plan)
