"""Presence, frequency and repetition penalties: what a sequence has said changes what it may say next."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gateway.messages import SamplingParams


class TokenCounts:
    """The distinct tokens of one sequence, and how often each was generated. Brought up to date step by step."""

    def __init__(self, params: SamplingParams, prompt_length: int) -> None:
        self.presence = params.presence_penalty
        self.frequency = params.frequency_penalty
        self.repetition = params.repetition_penalty
        # Only the repetition penalty looks at the prompt.
        self._prompt = prompt_length if params.repetition_penalty != 1 else 0
        self._seen = 0 if self._prompt else prompt_length
        self._slots: dict[int, int] = {}
        self._ids = np.empty(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """[U]: the distinct tokens"""
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """[U]: how often each was generated; 0 for those only in the prompt"""
        return self._counts[: len(self._slots)]

    def catch_up(self, tokens: list[int]) -> None:
        """Count what was appended to the sequence's `tokens` since the last time."""
        for token in dict.fromkeys(tokens[self._seen : self._prompt]):
            self._slot(token)
        for token in tokens[max(self._seen, self._prompt) :]:
            slot = self._slot(token)
            self._counts[slot] += 1
        self._seen = len(tokens)

    def _slot(self, token: int) -> int:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        return slot


@dataclass(frozen=True, slots=True)
class Penalised:
    """A row of a batch and the counts of its sequence."""

    row: int
    counts: TokenCounts


def penalise(logits: torch.Tensor, penalised: Seq[Penalised]) -> None:
    """Change `logits` [S, vocabulary] in place, at the tokens that the sequences have used; no row comes twice.

    First the repetition penalty, which scales, then the other two, which subtract.
    """
    device, counts = logits.device, [entry.counts for entry in penalised]
    sizes = [len(count.ids) for count in counts]
    rows = torch.from_numpy(np.repeat([entry.row for entry in penalised], sizes)).to(device)
    tokens = torch.from_numpy(np.concatenate([count.ids for count in counts])).to(device)
    used = torch.from_numpy(np.concatenate([count.counts for count in counts])).to(device)
    settings = np.array([(c.repetition, c.presence, c.frequency) for c in counts], dtype=np.float32)
    repetition, presence, frequency = torch.from_numpy(np.repeat(settings, sizes, axis=0)).to(device).unbind(1)
    values = logits[rows, tokens]
    values = torch.where(values > 0, values / repetition, values * repetition)
    logits[rows, tokens] = values - presence * (used > 0) - frequency * used
