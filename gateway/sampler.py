"""Choosing the next token of every sequence of a batch.

The random number behind a token is a pure function of the sequence's seed and of the token's position, and it picks
from the distribution by inverting its cumulative sum. So a sampled text does not depend on what else is in the batch,
and a sequence resubmitted with the tokens it already has continues as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch

from gateway.sequence import Sequence

INVALID = -1
"""In place of a token: the model left nothing to choose from (not a number, or everything forbidden)."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1

Words = npt.NDArray[np.uint64]


@torch.inference_mode()
def sample(logits: torch.Tensor, sequences: Seq[Sequence]) -> list[int]:
    """The next token of each of `sequences`, from `logits` [S, vocabulary] in the same order; `INVALID` for none."""
    logits = _forbid_early_stops(logits.float(), sequences)
    best, tokens = logits.max(dim=-1)
    tokens = tokens.where(best.isfinite(), INVALID)
    rows = [i for i, sequence in enumerate(sequences) if sequence.params.temperature > 0]
    if rows:
        everything = len(rows) == len(sequences)
        index = torch.tensor(rows, device=logits.device)
        chosen = _draw(logits if everything else logits[index], [sequences[i] for i in rows])
        tokens[index] = chosen.where(tokens[index] != INVALID, INVALID)
    return [int(token) for token in tokens.tolist()]


def uniform(seeds: Words, positions: Words) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each pair of `seeds` and `positions` (both uint64), alike for alike pairs.

    Two rounds of splitmix64 (Steele, Lea and Flood 2014), a counter-based generator: no state, no order.
    """
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(seeds + _GOLDEN) + (positions + np.uint64(1)) * _GOLDEN)
    return np.ldexp((mixed >> np.uint64(11)).astype(np.float64), -53)


def _mix(z: Words) -> Words:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _forbid_early_stops(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    early = [
        (row, token)
        for row, sequence in enumerate(sequences)
        if sequence.generated < sequence.params.min_tokens
        for token in sequence.params.stop_token_ids
    ]
    if not early:
        return logits
    rows, tokens = torch.tensor(early, device=logits.device).unbind(1)
    return logits.index_put((rows, tokens), logits.new_tensor(float("-inf")))


def _draw(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """Sampled tokens [S] for `logits` [S, vocabulary] of sequences with a temperature."""
    params = [sequence.params for sequence in sequences]
    temperature = logits.new_tensor([p.temperature for p in params])[:, None]
    # Relative to the best token, so that a tiny temperature does not overflow.
    scores = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    cut = [i for i, p in enumerate(params) if p.top_p < 1 or 0 < p.top_k < logits.shape[-1]]
    if cut:
        index = torch.tensor(cut, device=logits.device)
        kept = _keep_likely(scores[index], [params[i].top_k for i in cut], [params[i].top_p for i in cut])
        scores = scores.index_copy(0, index, kept)
    seeds = np.array([sequence.seed & _MASK for sequence in sequences], dtype=np.uint64)
    positions = np.array([sequence.generated for sequence in sequences], dtype=np.uint64)
    return _invert(scores, torch.from_numpy(uniform(seeds, positions)).to(logits.device))


def _keep_likely(scores: torch.Tensor, top_k: list[int], top_p: list[float]) -> torch.Tensor:
    """`scores` [S, vocabulary] with -inf outside each row's `top_k` best (0: all) and, of these, its `top_p` nucleus.

    The nucleus is the smallest set of best tokens with a probability of `top_p` (Holtzman et al., arXiv 1904.09751).
    """
    vocabulary = scores.shape[-1]
    ordered, tokens = scores.sort(dim=-1, descending=True, stable=True)
    limits = torch.tensor([k or vocabulary for k in top_k], device=scores.device)[:, None]
    ordered = ordered.masked_fill(torch.arange(vocabulary, device=scores.device) >= limits, float("-inf"))
    probabilities = ordered.softmax(dim=-1, dtype=torch.float64)
    before = probabilities.cumsum(dim=-1) - probabilities
    nucleus = torch.tensor(top_p, dtype=torch.float64, device=scores.device)[:, None]
    # The best token always stays; a nucleus of 1 keeps all, whatever the sum rounds to.
    drop = (before >= nucleus) & (nucleus < 1)
    drop[:, 0] = False
    return torch.empty_like(scores).scatter_(-1, tokens, ordered.masked_fill(drop, float("-inf")))


def _invert(scores: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """For each row the first token at which the cumulative probability exceeds its number in [0, 1)."""
    sums = scores.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    total = sums[:, -1]
    target = (numbers * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(sums, target[:, None], right=True).squeeze(1).clamp_(max=scores.shape[-1] - 1)
