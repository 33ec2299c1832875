"""Durations and windows as people write them: ``90``, ``500ms``, ``1h30m``; ``1h..2h30m``, ``..10m``."""

from __future__ import annotations

import math
import re

from replay.trace import TraceError

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ms|s|m|h|d)")


def parse_duration(text: str, what: str) -> float:
    """Seconds; a bare number is seconds already. Raise TraceError, naming `what`, for anything else."""
    text = text.strip()
    if re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
        return float(text)
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise TraceError(f"{what} {text!r} is no duration: write seconds, or 500ms, 90s, 5m, 1h30m, 2d")
    return math.fsum(float(number) * _UNITS[unit] for number, unit in parts)


def parse_window(text: str) -> tuple[float, float | None]:
    """(start, end) of ``START..END`` in seconds, either of which may be left out; raise TraceError for others."""
    start, dots, end = text.partition("..")
    if not dots:
        raise TraceError(f"--window {text!r} is not understood: write START..END since the trace began, as 1h..2h")
    window = (parse_duration(start, "--window") if start else 0.0, parse_duration(end, "--window") if end else None)
    if window[1] is not None and window[1] <= window[0]:
        raise TraceError(f"--window {text!r} ends before it begins")
    return window


def tell_duration(seconds: float) -> str:
    """A duration for people, as 2d03h, 1h05m, 4m10s, 12.3s or 45ms."""
    if seconds < 1:
        return f"{1000 * seconds:.3g}ms"
    if seconds < 60:
        return f"{seconds:.3g}s"
    whole = round(seconds)
    for unit, smaller, size, part in (("m", "s", 60, 1), ("h", "m", 3600, 60), ("d", "h", 86400, 3600)):
        if whole < size * (24 if unit == "h" else 60) or unit == "d":
            return f"{whole // size}{unit}{whole % size // part:02d}{smaller}"
    raise AssertionError("days are the largest unit")
