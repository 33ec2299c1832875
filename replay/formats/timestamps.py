"""Times of day as Azure's traces write them, with any number of digits in their fraction."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from replay.formats.columns import LATEST_S, NS

_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d:?\d\d)?")


def has_offset(text: str) -> bool:
    """Whether `text` tells its time zone."""
    found = _TIMESTAMP.fullmatch(text.strip())
    return bool(found and found[3])


def is_naive(text: str) -> bool:
    """Whether `text` is a timestamp without a time zone."""
    found = _TIMESTAMP.fullmatch(text.strip())
    return bool(found and not found[3])


def naive_ns(text: str) -> int:
    """Nanoseconds since 1970 of a timestamp without time zone; raise ValueError for anything else."""
    return _nanoseconds(text, "", "YYYY-MM-DD HH:MM:SS.fffffff")


def offset_ns(text: str) -> int:
    """Nanoseconds since 1970 of a timestamp with a time zone; raise ValueError for anything else."""
    return _nanoseconds(text, "+", "YYYY-MM-DD HH:MM:SS.ffffff+00:00")


def _nanoseconds(text: str, zone: str, pattern: str) -> int:
    found = _TIMESTAMP.fullmatch(text)
    try:
        if not found or bool(found[3]) != bool(zone):
            raise ValueError
        moment = datetime.fromisoformat(found[1] + (found[3] or ""))
        whole = int(moment.replace(tzinfo=moment.tzinfo or UTC).timestamp())
        if not abs(whole) < LATEST_S:
            raise ValueError
    except ValueError:
        raise ValueError(f"TIMESTAMP is not {pattern}: {text[:40]!r}") from None
    return whole * NS + int((found[2] or "").ljust(9, "0"))
