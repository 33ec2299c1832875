"""What changes logits before a token is chosen, greedily or not: bias, penalties, grammars, min_tokens."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from gateway import grammar, penalties
from gateway.penalties import Penalised
from gateway.sampling_state import BIAS, GRAMMAR, MIN_TOKENS, PENALTIES
from gateway.sequence import Sequence


def edit(logits: torch.Tensor, sequences: Seq[Sequence], needs: int) -> None:
    """Change `logits` [S, vocabulary] in place as `sequences` want it; `needs` is all that any of them needs."""
    if needs & BIAS:
        _add_bias(logits, sequences)
    if needs & PENALTIES:
        _penalise(logits, sequences)
    if needs & GRAMMAR:
        _mask(logits, sequences)
    if needs & MIN_TOKENS:
        _forbid_early_stops(logits, sequences)


def _add_bias(logits: torch.Tensor, sequences: Seq[Sequence]) -> None:
    biased = [(row, bias) for row, one in enumerate(sequences) if (bias := one.sampling.bias) is not None]
    rows = np.repeat([row for row, _ in biased], [len(tokens) for _, (tokens, _) in biased])
    tokens, values = (np.concatenate(parts) for parts in zip(*(bias for _, bias in biased), strict=True))
    index = torch.from_numpy(np.stack([rows, tokens])).to(logits.device)
    logits[index[0], index[1]] += torch.from_numpy(values).to(logits.device)


def _penalise(logits: torch.Tensor, sequences: Seq[Sequence]) -> None:
    penalised = []
    for row, sequence in enumerate(sequences):
        if (counts := sequence.sampling.counts) is not None:
            counts.catch_up(sequence.tokens)
            penalised.append(Penalised(row, counts))
    penalties.penalise(logits, penalised)


def _mask(logits: torch.Tensor, sequences: Seq[Sequence]) -> None:
    rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.grammar is not None]
    states = [state for sequence in sequences if (state := sequence.sampling.grammar) is not None]
    for row, state in zip(rows, states, strict=True):
        state.catch_up(sequences[row].tokens)
    grammar.mask(logits, rows, states)


def _forbid_early_stops(logits: torch.Tensor, sequences: Seq[Sequence]) -> None:
    """Where nothing but stopping is left (a grammar is at its end), stopping stays allowed."""
    rows = []
    for row, sequence in enumerate(sequences):
        if sequence.sampling.needs & MIN_TOKENS:
            if sequence.generated < sequence.params.min_tokens:
                rows.append(row)
            else:
                sequence.sampling.needs &= ~MIN_TOKENS
    if not rows:
        return
    early = [(i, token) for i, row in enumerate(rows) for token in sequences[row].params.stop_token_ids]
    index, stops = torch.tensor(rows, device=logits.device), torch.tensor(early, device=logits.device)
    before = logits[index]
    after = before.clone()
    after[stops[:, 0], stops[:, 1]] = float("-inf")
    stuck = after.amax(dim=-1, keepdim=True).isneginf()
    logits[index] = torch.where(stuck, before, after)
