"""What one engine step routed, as the recording side hands it over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class StepRouting:
    """What one engine step routed. R rows, L MoE layers, E experts, k = top-k; N running sequences."""

    time_s: float
    """Seconds on the engine's clock when the step ended."""
    token_ids: npt.NDArray[np.int32]
    """[R]"""
    sequences: npt.NDArray[np.int64]
    """[R]: a number per sequence, the same for its whole life"""
    prefill: npt.NDArray[np.bool_]
    """[R]: true for a row of a prompt chunk, false for one that comes from a token the model emitted"""
    experts: npt.NDArray[np.int16]
    """[L, R, k]: the router's choice"""
    look_ahead: npt.NDArray[np.int32]
    """[L, E]: rows per expert that a layer's gate would choose from the MoE input of the layer above; zeros for the
    first MoE layer"""
    running: npt.NDArray[np.int64]
    """[N]: sequences that hold a place after the step"""
    prompt_left: npt.NDArray[np.int32]
    """[N]: their prompt tokens not yet computed"""
    tokens_left: npt.NDArray[np.int32]
    """[N]: tokens they may still emit at most"""
    queue: Sequence[tuple[int, int, int]]
    """(sequence, first, last) of the tokens still to be prefilled, the rest of running prompts and then the waiting
    queue in order of service; about the first 64 x `token_budget`"""
    prompts: Mapping[int, npt.NDArray[np.int32]]
    """The token ids of these sequences, from each one's first on"""
    waiting: int
    """Sequences that wait."""
    waiting_tokens: int
    """Prompt tokens of all of them."""
    token_budget: int
    """Rows a step computes at most."""
    max_sequences: int
    """Sequences that hold a place at most."""
