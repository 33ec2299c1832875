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
from torch.nn import functional as F

from gateway.logit_edits import edit
from gateway.logprobs import logprobs
from gateway.messages import Logprobs, SamplingParams
from gateway.sampling_state import CUT, DRAW, EDITS, LOGPROBS
from gateway.sequence import Sequence

INVALID = -1
"""In place of a token: the model left nothing to choose from (not a number, or everything forbidden)."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1
_BLOCK = 64
"""Tokens whose probabilities are summed before the cumulative sum, which is the slow part, is taken."""

Words = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.float64]


@torch.inference_mode()
def sample(logits: torch.Tensor, sequences: Seq[Sequence]) -> list[int]:
    """The next token of each of `sequences`, from `logits` [S, vocabulary] in the same order; `INVALID` for none."""
    needs = 0
    for sequence in sequences:
        needs |= sequence.sampling.needs
    if needs & EDITS:
        logits = logits.to(torch.float32, copy=True)
        edit(logits, sequences, needs)
    best, tokens = logits.max(dim=-1)
    tokens = tokens.where(best.isfinite(), INVALID)
    if needs & DRAW:
        _draw_over(tokens, logits, sequences)
    chosen: list[int] = tokens.tolist()
    return chosen


def tell(logits: torch.Tensor, sequences: Seq[Sequence], tokens: Seq[int]) -> dict[int, Logprobs]:
    """Log-probabilities of the `tokens` chosen from `logits` [S, vocabulary], by row, where sequences ask for them."""
    rows = [i for i, s in enumerate(sequences) if s.sampling.needs & LOGPROBS and tokens[i] != INVALID]
    if not rows:
        return {}
    index = torch.tensor(rows, device=logits.device)
    best = [sequences[i].params.logprobs or 0 for i in rows]
    return dict(zip(rows, logprobs(logits[index], [tokens[i] for i in rows], best), strict=True))


def uniform(seeds: Words, positions: Words) -> Numbers:
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


def _draw_over(tokens: torch.Tensor, logits: torch.Tensor, sequences: Seq[Sequence]) -> None:
    """Replace the best tokens [S] by drawn ones where sequences have a temperature, but for `INVALID` ones."""
    rows = [i for i, sequence in enumerate(sequences) if sequence.sampling.needs & DRAW]
    if len(rows) == len(sequences):
        tokens.copy_(_draw(logits, sequences).where(tokens != INVALID, INVALID))
    else:
        index = torch.tensor(rows, device=logits.device)
        chosen = _draw(logits[index], [sequences[i] for i in rows])
        tokens[index] = chosen.where(tokens[index] != INVALID, INVALID)


def _draw(logits: torch.Tensor, sequences: Seq[Sequence]) -> torch.Tensor:
    """Sampled tokens [S] for `logits` [S, vocabulary] of sequences with a temperature."""
    temperature = torch.tensor([sequence.params.temperature for sequence in sequences], device=logits.device)
    probabilities = (logits.float() / temperature[:, None]).softmax(dim=-1)
    cut = [i for i, sequence in enumerate(sequences) if sequence.sampling.needs & CUT]
    if len(cut) == len(sequences):
        _keep_likely(probabilities, [sequence.params for sequence in sequences])
    elif cut:
        index = torch.tensor(cut, device=logits.device)
        rows = probabilities[index]
        _keep_likely(rows, [sequences[i].params for i in cut])
        probabilities[index] = rows
    seeds = np.array([sequence.seed & _MASK for sequence in sequences], dtype=np.uint64)
    positions = np.array([sequence.generated for sequence in sequences], dtype=np.uint64)
    return _invert(probabilities, uniform(seeds, positions))


def _keep_likely(probabilities: torch.Tensor, params: Seq[SamplingParams]) -> None:
    """Set to 0 in `probabilities` [S, vocabulary] what min_p, then top_k, then top_p drop; tokens that tie stay.

    top_p keeps the nucleus, the smallest set of best tokens with a share of top_p of what there still is (Holtzman et
    al., arXiv 1904.09751); min_p what is at least so probable relative to the best (Nguyen et al., arXiv 2407.01082).
    """
    if any(p.min_p > 0 for p in params):
        min_p = probabilities.new_tensor([p.min_p for p in params])[:, None]
        _drop_below(min_p * probabilities.amax(dim=-1, keepdim=True), probabilities)
    if any(p.top_k > 0 or p.top_p < 1 for p in params):
        _drop_below(_floor(probabilities, [p.top_k for p in params], [p.top_p for p in params]), probabilities)


def _drop_below(floor: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Set to 0 what is below `floor` [S, 1]; a product is several times faster than filling by a mask."""
    probabilities.mul_(probabilities >= floor)


def _floor(rows: torch.Tensor, top_k: list[int], top_p: list[float]) -> torch.Tensor:
    """The least probability [S, 1] that top_k (0: all) and then top_p keep of `rows` [S, vocabulary]."""
    vocabulary = rows.shape[-1]
    rising = _sorted(rows)
    sums = rising.cumsum(dim=-1, dtype=torch.float64)
    total = sums[:, -1:]
    # In rising order, where the k best begin, and what the tokens before them sum up to.
    first = torch.tensor([max(vocabulary - (k or vocabulary), 0) for k in top_k], device=rows.device)[:, None]
    below = sums.gather(1, first) - rising.gather(1, first)
    share = torch.tensor(top_p, dtype=torch.float64, device=rows.device)[:, None]
    outside = torch.searchsorted(sums, below + (1 - share) * (total - below), right=True)
    return rising.gather(1, outside.maximum(first).clamp_(max=vocabulary - 1))  # the best token always stays


def _sorted(rows: torch.Tensor) -> torch.Tensor:
    """Each row in rising order. On a CPU numpy is some thirty times as fast as torch."""
    if rows.device.type == "cpu":
        return torch.from_numpy(np.sort(rows.numpy(), axis=-1))
    return rows.sort(dim=-1).values


def _invert(probabilities: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """For each row [S, vocabulary] the first token at which the cumulative probability exceeds its number in [0, 1).

    In two steps, first over blocks of tokens and then within one; so little is left for numpy, whose operations on few
    numbers cost a fraction of torch's. The rows need not sum to 1.
    """
    rows, vocabulary = probabilities.shape
    if vocabulary % _BLOCK:
        probabilities = F.pad(probabilities, (0, _BLOCK - vocabulary % _BLOCK))
    blocks = probabilities.view(rows, -1, _BLOCK)
    sums = blocks.sum(dim=-1).cpu().numpy().astype(np.float64)
    block, rest = _search(sums, numbers * sums.sum(axis=-1))
    at = torch.from_numpy(np.arange(rows) * blocks.shape[1] + block).to(blocks.device)
    within = blocks.flatten(0, 1).index_select(0, at).cpu().numpy().astype(np.float64)
    return torch.from_numpy(block * _BLOCK + _search(within, rest)[0]).to(blocks.device)


def _search(weights: Numbers, target: Numbers) -> tuple[npt.NDArray[np.int64], Numbers]:
    """The first entry of each row of `weights` [S, N] at which their sum exceeds `target` [S], and what is left of it.

    Never one of weight 0: rounding may leave `target` a little outside of what the row sums up to. Rows that are not
    numbers yield some token; nobody takes it.
    """
    sums = weights.cumsum(axis=-1)
    inside = np.minimum(np.maximum(target, 0), np.nextafter(sums[:, -1], 0))
    found = (sums > inside[:, None]).argmax(axis=-1)
    rows = np.arange(len(found))
    return found, inside - (sums[rows, found] - weights[rows, found])
