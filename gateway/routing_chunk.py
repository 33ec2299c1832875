"""What a gateway tells its load observer: the routing of some steps, in a form that travels between processes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import msgspec
import numpy as np
import numpy.typing as npt

from predictor.routing import StepRouting

QUEUE_STEPS = 64
"""Queued tokens are told for so many steps' budgets."""


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """What an observer is told first."""

    gateway: str
    shape: str
    """`ModelShape.to_json`"""
    redis_url: str | None = None
    """Where the load is streamed to; None: nowhere."""
    namespace: str = ""
    record: str | None = None
    """File that is written; None: none."""
    max_bytes: int = 1 << 30
    """Of that file."""


class StepHead(msgspec.Struct, frozen=True, array_like=True):
    """One step, but for its rows."""

    time_s: float
    works: list[tuple[int, int, int]]
    """(sequence, rows, how many of these are of its prompt) in the order of the rows; the prompt's come first"""
    running: list[tuple[int, int, int]]
    """(sequence, prompt tokens left, tokens it may still emit) of those that hold a place after the step"""
    queue: list[tuple[int, int, int]]
    """(sequence, first, last) of the tokens that wait to be prefilled, in order of service"""
    waiting: int
    waiting_tokens: int


class RoutingChunk(msgspec.Struct, frozen=True, array_like=True):
    """S steps of R rows in all, of a model with L MoE layers of E experts, K of them for each row."""

    steps: list[StepHead]
    token_ids: bytes
    """int32 [R]"""
    experts: bytes
    """int16 [L, R, K]"""
    look_ahead: bytes
    """int32 [S, L, E]"""
    queued: dict[int, bytes]
    """Tokens (int32) of the sequences that the steps' queues name."""
    token_budget: int
    max_sequences: int
    dropped: int
    """Steps before these that nobody will hear of."""

    def routings(self, layers: int, experts: int) -> Iterator[StepRouting]:
        """Each step, in order."""
        tokens = np.frombuffer(self.token_ids, np.int32)
        chosen = np.frombuffer(self.experts, np.int16).reshape(layers, len(tokens), -1)
        ahead = np.frombuffer(self.look_ahead, np.int32).reshape(len(self.steps), layers, experts)
        queued = {sequence: np.frombuffer(ids, np.int32) for sequence, ids in self.queued.items()}
        # Converted for all steps at once: there may be thousands of them a minute.
        works, work_ends = _joined([step.works for step in self.steps])
        running, running_ends = _joined([step.running for step in self.steps])
        sequences, prefill = np.repeat(works[:, 0], works[:, 1]), _prefill(works)
        row_ends = np.concatenate([[0], np.cumsum(works[:, 1])])[work_ends].tolist()
        numbers, left = np.ascontiguousarray(running[:, 0]), running[:, 1:].astype(np.int32)
        for place, step in enumerate(self.steps):
            rows = slice(row_ends[place], row_ends[place + 1])
            who = slice(running_ends[place], running_ends[place + 1])
            yield StepRouting(
                time_s=step.time_s,
                token_ids=tokens[rows],
                sequences=sequences[rows],
                prefill=prefill[rows],
                experts=chosen[:, rows],
                look_ahead=ahead[place],
                running=numbers[who],
                prompt_left=left[who, 0],
                tokens_left=left[who, 1],
                queue=step.queue,
                prompts=queued,
                waiting=step.waiting,
                waiting_tokens=step.waiting_tokens,
                token_budget=self.token_budget,
                max_sequences=self.max_sequences,
            )


def _joined(parts: list[list[tuple[int, int, int]]]) -> tuple[npt.NDArray[np.int64], list[int]]:
    """All of `parts` as rows of three, and where each part begins, with the end of the last."""
    ends = [0, *accumulate(map(len, parts))]
    return np.array([row for part in parts for row in part], np.int64).reshape(-1, 3), ends


def _prefill(works: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    kinds = np.stack([works[:, 2], works[:, 1] - works[:, 2]], axis=1)
    return np.repeat(np.tile([True, False], len(works)), kinds.ravel())
