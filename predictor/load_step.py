"""One engine step's load and what was known about the next ones: what is stored, streamed and learned from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

QUEUE_SPANS = (1, 2, 4, 8, 16, 64)
"""How much of the queue is looked at, in token budgets."""

SIGNALS = (*(f"queue_{span}" for span in QUEUE_SPANS), "decode_near", "decode_far", "prompt_own")
"""What is known about coming rows, each an expectation of how a certain set of rows will be routed:

- ``queue_1`` to ``queue_64``: queued prompt tokens that fill so many steps' budgets, by the token -> expert affinity;
- ``decode_near``, ``decode_far``: rows the running sequences are expected to decode within 16 steps, and until their
  ends, by each one's own routing so far;
- ``prompt_own``: rows left of prompts that have begun, by their own routing so far.
"""


@dataclass(frozen=True, slots=True)
class LoadStep:
    """A step's load [L layers, E experts] and the signals after it. It holds no token ids and no text."""

    time_s: float
    """Seconds on the engine's clock when the step ended."""
    prefill_rows: int
    decode_rows: int
    """Rows that came from tokens the model emitted."""
    running: int
    """Sequences that hold a place after the step; `waiting` wait for one."""
    waiting: int
    waiting_tokens: int
    """Prompt tokens of all that wait."""
    prompt_left: int
    """Prompt tokens not yet computed of those that run."""
    token_budget: int
    max_sequences: int
    """Sequences that hold a place at most."""
    prefill_counts: npt.NDArray[np.int32]
    """[L, E]: rows of prompts each expert got; a layer's sum is ``prefill_rows * top_k``"""
    decode_counts: npt.NDArray[np.int32]
    """[L, E]: the same of decoding rows"""
    look_ahead: npt.NDArray[np.int32]
    """[L, E]: see `StepRouting.look_ahead`"""
    signals: npt.NDArray[np.float32]
    """[S, L, E]: see `SIGNALS`; shares that sum to 1 for each signal and layer, or all zeros where nothing is known"""
    signal_rows: npt.NDArray[np.float32]
    """[S]: how many rows each signal speaks of"""
    foreseen: npt.NDArray[np.float32]
    """[L, E]: rows as the affinity, before it learned this step, expects them of the very tokens that were computed:
    what a forecaster would say who knows which tokens come. Zeros where nobody asked for it"""
