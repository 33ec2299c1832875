"""Rows of one step or of several, as they are learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from predictor.routing import StepRouting

_MOST_CHOICES = 60_000  # of a step; from longer ones every n-th row is learned


@dataclass(frozen=True, slots=True)
class RoutedRows:
    """R rows."""

    tokens: npt.NDArray[np.int64]
    """[R]"""
    follows: npt.NDArray[np.bool_]
    """[R]: whether a row comes right after the row before it in a prompt"""
    sequences: npt.NDArray[np.int64]
    """[R]"""
    prefill: npt.NDArray[np.bool_]
    """[R]"""
    cells: npt.NDArray[np.int64]
    """[R, layers x top-k]: numbers of (layer, expert) that each was sent to"""
    gain: npt.NDArray[np.float32]
    """[R]: how much each counts, those of later steps more"""

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, step: StepRouting, cells: npt.NDArray[np.int64], gain: float) -> RoutedRows:
        """Those of a step, or of a very long one some."""
        every = -(-cells.size // _MOST_CHOICES)
        follows = follows_in(step)
        if every > 1:
            some = slice(None, None, every)
            nothing = np.zeros(len(follows[some]), bool)
            return cls._of(step.token_ids[some], nothing, step.sequences[some], step.prefill[some], cells[some], gain)
        return cls._of(step.token_ids, follows, step.sequences, step.prefill, cells, gain)

    @classmethod
    def joined(cls, parts: Sequence[RoutedRows]) -> RoutedRows:
        """Those of several steps."""
        if len(parts) == 1:
            return parts[0]
        names = ("tokens", "follows", "sequences", "prefill", "cells", "gain")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @classmethod
    def _of(
        cls,
        tokens: npt.NDArray[np.int32],
        follows: npt.NDArray[np.bool_],
        sequences: npt.NDArray[np.int64],
        prefill: npt.NDArray[np.bool_],
        cells: npt.NDArray[np.int64],
        gain: float,
    ) -> RoutedRows:
        gains = np.full(len(tokens), gain, np.float32)
        return cls(tokens.astype(np.int64), follows, sequences, prefill, cells, gains)


def follows_in(step: StepRouting) -> npt.NDArray[np.bool_]:
    """Which rows [R] come right after the row before them in a prompt."""
    follows = np.zeros(len(step.prefill), bool)
    follows[1:] = step.prefill[1:] & (step.sequences[1:] == step.sequences[:-1])
    return follows
