"""The warm pool, as it is published in the directory."""

from __future__ import annotations

import msgspec

DOCUMENT = "warm-pool"
"""The pool's name in the directory."""


class WarmWorkers(msgspec.Struct, frozen=True, kw_only=True):
    """Idle workers with torch loaded."""

    wanted: int
    ready: int


def encode(workers: WarmWorkers) -> bytes:
    """As JSON."""
    return msgspec.json.encode(workers)


def decode(document: bytes) -> WarmWorkers:
    """Of a JSON document; raise msgspec.DecodeError where it is none."""
    return msgspec.json.decode(document, type=WarmWorkers)
