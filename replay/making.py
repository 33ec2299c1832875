"""Traces that are made up: `replay.traffic`'s requests on the clock of days. Pure and seeded.

Three things can be asked for, together or alone. *day*: the rate follows the hour, lowest at 04:00, highest at 16:00.
*bursty*: calm stretches alternate with bursts and lulls of seconds. *drifting*: the mix of kinds of text, and the rate,
wander over minutes. Without any of them requests arrive independently of one another at one rate.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import numpy as np
import numpy.typing as npt

from replay.trace import BLOCK_TOKENS, Chunk, TraceError
from replay.traffic import Profile, Request, Traffic

SHAPES = ("day", "bursty", "drifting")
_DAY_S = 86400.0
_LOWEST_S = 4 * 3600.0
_SWING = 0.7  # of the rate, about its mean
_GRID_S = 30.0
_ROWS = 4096
_TEXT = np.arange(1 << 20, dtype=np.int32)  # a prompt's first token tells where in its kind's text it begins


@dataclass(frozen=True, kw_only=True)
class Making:
    """What is asked for."""

    shapes: Sequence[str] = SHAPES
    hours: float = 24.0
    requests_per_s: float = 1.0
    """On average, over whole days"""
    prompt_tokens: float = 1000.0
    answer_tokens: float = 200.0
    """Mean lengths"""
    longest: int = 8192
    """Tokens of a request at most, prompt and answer together"""
    kinds: Sequence[str] = ("code", "docs", "chat", "data")
    """Kinds of text, equally likely on average"""
    starts_at_h: float = 0.0
    """The hour of the day at which the trace begins"""
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = next((shape for shape in self.shapes if shape not in SHAPES), None)
        if unknown is not None:
            raise TraceError(f"unknown --shape '{unknown}': choose of {', '.join(SHAPES)}, joined by commas, or steady")
        for name in ("hours", "requests_per_s", "prompt_tokens", "answer_tokens"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise TraceError(f"{name} is to be above 0, not {value}")


def make(making: Making) -> Iterator[Chunk]:
    """The trace, some thousand requests at a time; the same for the same `making`."""
    try:
        traffic = Traffic(
            dict.fromkeys(making.kinds, _TEXT),
            profile=(Profile(making.prompt_tokens, making.answer_tokens),),
            bursts="bursty" in making.shapes,
            drift="drifting" in making.shapes,
            requests_per_s=making.requests_per_s,
            longest=making.longest,
            seed=making.seed,
        )
    except ValueError as error:
        raise TraceError(str(error)) from error
    span_s = 3600.0 * making.hours
    clock = _Day(span_s, 3600.0 * making.starts_at_h) if "day" in making.shapes else None
    end = clock.end if clock else span_s
    for rows in _batches(takewhile(lambda request: request.time_s < end, traffic)):
        time = np.array([row.time_s for row in rows])
        yield _chunk(rows, clock.times(time) if clock else time)


class _Day:
    """A clock on which a steady stream of requests follows the hour of the day."""

    def __init__(self, span_s: float, starts_at_s: float) -> None:
        self._time = np.linspace(0.0, span_s, 2 + int(span_s / _GRID_S))
        angle = 2 * np.pi / _DAY_S
        phase = self._time + starts_at_s - _LOWEST_S
        passed = self._time - _SWING / angle * (np.sin(angle * phase) - np.sin(angle * phase[0]))
        self._passed = passed  # how far the steady stream is at each time
        self.end = float(passed[-1])

    def times(self, steady: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """When what happens at `steady` on the even clock happens on this one."""
        return np.interp(steady, self._passed, self._time)


def _batches(requests: Iterable[Request]) -> Iterator[list[Request]]:
    iterator = iter(requests)
    while batch := list(islice(iterator, _ROWS)):
        yield batch


def _chunk(rows: Sequence[Request], time_s: npt.NDArray[np.float64]) -> Chunk:
    return Chunk(
        time_s,
        np.array([len(row.prompt) for row in rows], np.int64),
        np.array([row.answer_tokens for row in rows], np.int64),
        tuple(_ids(row) for row in rows),
        tuple(row.kind for row in rows),
    )


def _ids(row: Request) -> tuple[int, ...]:
    """Ids of the prompt's blocks: the same for prompts that begin at the same place of the same text."""
    place = hashlib.blake2b(f"{row.kind} {row.prompt[0]}".encode(), digest_size=4).digest()
    first = int.from_bytes(place, "little") << 12
    return tuple(range(first, first + -(-len(row.prompt) // BLOCK_TOKENS)))
