"""A trace: when requests arrived, how long their prompts and answers were, and what they had in common.

Traces have millions of rows, so they travel in chunks of columns. `Chunk` is what every format is read into, what
`replay.transforms` changes, and what simulation, statistics and replay consume; `requests` tells its rows one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BLOCK_TOKENS = 512
"""Prompt tokens that one of `hash_ids` stands for; the last one of a prompt may stand for fewer."""


class TraceError(ValueError):
    """A trace that can't be used as asked; the message is one line for the operator."""


@dataclass(frozen=True)
class Chunk:
    """N consecutive requests of a trace, in order of time."""

    time_s: npt.NDArray[np.float64]
    """[N] seconds since the first request of the trace, never falling"""
    prompt_tokens: npt.NDArray[np.int64]
    """[N]"""
    answer_tokens: npt.NDArray[np.int64]
    """[N]; 0 for a request that failed when the trace was recorded"""
    hash_ids: tuple[tuple[int, ...], ...] | None = None
    """One id for each `BLOCK_TOKENS` of a prompt: requests whose first ids are the same begin alike. None: unknown."""
    kinds: tuple[str, ...] | None = None
    """What kind of text each prompt is ("" where nobody said). None: unknown."""

    def __len__(self) -> int:
        return len(self.time_s)

    def take(self, which: npt.NDArray[np.int64]) -> Chunk:
        """The requests numbered `which`, in that order; a number may come more than once."""
        chosen = which.tolist()
        return Chunk(
            self.time_s[which],
            self.prompt_tokens[which],
            self.answer_tokens[which],
            None if self.hash_ids is None else tuple(self.hash_ids[row] for row in chosen),
            None if self.kinds is None else tuple(self.kinds[row] for row in chosen),
        )


@dataclass(frozen=True)
class TraceRequest:
    """One request of a trace."""

    index: int
    """Its number, from 0, among those that are used"""
    time_s: float
    prompt_tokens: int
    answer_tokens: int
    hash_ids: tuple[int, ...] = ()
    kind: str = ""


def requests(chunks: Iterable[Chunk]) -> Iterator[TraceRequest]:
    """The rows of `chunks`, one by one, numbered."""
    index = 0
    for chunk in chunks:
        columns = (chunk.time_s.tolist(), chunk.prompt_tokens.tolist(), chunk.answer_tokens.tolist())
        for row, (time_s, prompt, answer) in enumerate(zip(*columns, strict=True)):
            ids = chunk.hash_ids[row] if chunk.hash_ids is not None else ()
            kind = chunk.kinds[row] if chunk.kinds is not None else ""
            yield TraceRequest(index, time_s, prompt, answer, ids, kind)
            index += 1
