"""What the sampling of one sequence asks for beyond the best token, and what it remembers from step to step."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gateway.grammar import GrammarState
from gateway.logprobs import PromptLogprobs
from gateway.messages import Logprobs, SamplingParams
from gateway.penalties import TokenCounts

DRAW = 1
"""A token is drawn: the temperature is not 0."""
CUT = 2
"""Unlikely tokens are cut off first (top_k, top_p, min_p)."""
BIAS = 4
PENALTIES = 8
GRAMMAR = 16
MIN_TOKENS = 32
LOGPROBS = 64

EDITS = BIAS | PENALTIES | GRAMMAR | MIN_TOKENS
"""Needs that change logits before a token is chosen."""
_COLDEST = 1e-5
"""Temperatures below are greedy: dividing by them overflows."""


class SamplingState:
    """Made once for a sequence, so that a step asks one number of each: `needs`, a sum of the constants above."""

    __slots__ = ("bias", "counts", "grammar", "needs", "prompt_logprobs")

    def __init__(self, params: SamplingParams, prompt_length: int, generated: int) -> None:
        self.needs = _needs(params)
        self.counts = TokenCounts(params, prompt_length) if self.needs & PENALTIES else None
        self.bias = _bias(params.logit_bias) if params.logit_bias else None
        self.grammar: GrammarState | None = None
        self.prompt_logprobs: PromptLogprobs | None = None
        # Whoever has the first token has the prompt's log-probabilities too: they travel together.
        if params.prompt_logprobs is not None and not generated:
            self.prompt_logprobs = PromptLogprobs(params.prompt_logprobs, prompt_length)

    def keep_to(self, grammar: GrammarState) -> None:
        """Let `grammar` have a say."""
        self.grammar = grammar
        self.needs |= GRAMMAR

    @property
    def failure(self) -> str | None:
        """Why no token is left to choose, where that is the grammar's doing: one sentence."""
        return None if self.grammar is None else self.grammar.failure

    def completed(self, tokens: list[int]) -> bool:
        """Whether the sequence's `tokens` end a grammar, so that nothing can follow them."""
        if self.grammar is None:
            return False
        self.grammar.catch_up(tokens)
        return self.grammar.complete

    def take_prompt_logprobs(self) -> Logprobs | None:
        """Hand them over, once."""
        if self.prompt_logprobs is None:
            return None
        collected, self.prompt_logprobs = self.prompt_logprobs.result(), None
        return collected


def _bias(bias: dict[int, float]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Tokens [B], and what is added to the logit of each [B]."""
    return np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), dtype=np.float32)


def _needs(params: SamplingParams) -> int:
    draws = params.temperature >= _COLDEST
    cuts = draws and (params.top_p < 1 or params.top_k > 0 or params.min_p > 0)
    penalties = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    return (
        DRAW * draws
        + CUT * cuts
        + BIAS * bool(params.logit_bias)
        + PENALTIES * bool(penalties)
        + MIN_TOKENS * bool(params.min_tokens and params.stop_token_ids)
        + LOGPROBS * (params.logprobs is not None)
    )
