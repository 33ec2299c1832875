"""A step's work as tensors: the rows of all its sequences, flattened."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from gateway.attention import AttentionStep
from gateway.kv_cache import KVCache
from gateway.rope import LengthRope
from gateway.row_groups import Chunk, length_class
from gateway.scheduler import Work
from gateway.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything one forward needs, T rows in all."""

    works: list[Work]
    """In the order of their rows."""
    token_ids: torch.Tensor
    """[T]"""
    positions: torch.Tensor
    """[T]: each row's position in its own sequence"""
    sample_rows: torch.Tensor
    """[S + P]: rows whose logits are wanted: first those that yield a token, then those of `scored`"""
    sampled: list[Sequence]
    """[S]: the sequences that get a token, in the order of their rows"""
    scored: list[tuple[Sequence, int]]
    """Sequences that want the logits of prompt rows, and how many rows each has; P in all."""
    lengths: list[int]
    """[T] for a rotary embedding that depends on lengths (see `gateway.rope`), else empty"""
    attention: AttentionStep


def build_batch(
    works: Seq[Work], cache: KVCache, *, rope: LengthRope | None = None, device: torch.device | str = "cpu"
) -> Batch:
    """Flatten `works`: decoding sequences first and by length, so that those of alike length are computed together."""
    ordered = sorted(works, key=lambda work: _place(work, cache.block_size))
    tokens: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    sample_rows: list[int] = []
    scored_rows: list[int] = []
    scored: list[tuple[Sequence, int]] = []
    for work in ordered:
        sequence, start = work.sequence, work.sequence.computed
        if (wanted := sequence.sampling.prompt_logprobs) is not None:
            missing = wanted.missing(start, work.count)
            scored_rows += range(len(tokens) + missing.start - start, len(tokens) + missing.stop - start)
            scored.append((sequence, len(missing)))
        tokens += sequence.tokens[start : start + work.count]
        positions += range(start, start + work.count)
        if work.samples:
            sample_rows.append(len(tokens) - 1)
        if rope is not None:
            lengths += rope.row_lengths(
                start, work.count, prompt_length=sequence.prompt_length, total=len(sequence.tokens)
            )
    return Batch(
        works=ordered,
        token_ids=torch.tensor(tokens, device=device),
        positions=torch.tensor(positions, device=device),
        sample_rows=torch.tensor(sample_rows + scored_rows, dtype=torch.long, device=device),
        sampled=[work.sequence for work in ordered if work.samples],
        scored=scored,
        lengths=lengths,
        attention=AttentionStep(
            cache, [Chunk(w.sequence.blocks, w.sequence.computed, w.count) for w in ordered], device
        ),
    )


def _place(work: Work, block_size: int) -> tuple[int, int]:
    length = work.sequence.computed + work.count
    return work.count, length_class(length, block_size) if work.count == 1 else -(-length // block_size)
