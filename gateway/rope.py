"""Rotary embeddings whose frequencies depend on how long the sequence is.

transformers' `dynamic` and `longrope` kinds choose frequencies (or a magnitude) by the largest position of the whole
batch. With the rows of many sequences in one batch, one long sequence would change all the others: here every row is
computed with the length of its own sequence, as if it were alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


class UnsupportedRopeError(ValueError):
    """A rotary embedding that cannot be computed row by row; the message says which."""


def length_rope(network: nn.Module) -> LengthRope | None:
    """Take over `network`'s rotary embedding if it depends on the sequence's length; None if it does not."""
    found = None
    for name, module in network.named_modules():
        kind = getattr(module, "rope_type", None)
        kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
        if not any(k == "longrope" or "dynamic" in str(k) for k in kinds):
            continue
        if isinstance(kind, dict) or found is not None:
            raise UnsupportedRopeError(f"{name}: several rotary embeddings that depend on length are not supported")
        found = LengthRope(module)
    return found


class LengthRope:
    """A rotary module's forward, called once for each class of lengths among the step's rows.

    `lengths` must be set to the rows' lengths before each forward of the model.
    """

    def __init__(self, rotary: nn.Module) -> None:
        parameters: dict[str, Any] = rotary.config.rope_parameters  # type: ignore[union-attr,assignment]
        self._long = rotary.rope_type == "longrope"
        self._rotary = rotary
        self._forward: Callable[..., Any] = rotary.forward
        self._original: int = parameters.get("original_max_position_embeddings") or rotary.original_max_seq_len  # type: ignore[assignment]
        self.lengths: Sequence[int] = ()
        rotary.forward = self._per_length

    @property
    def restart_length(self) -> int | None:
        """A sequence that grows to this many tokens must be computed anew from its first.

        `longrope` has one set of frequencies for short sequences and another for long ones; keys of both in one cache
        do not go together.
        """
        return self._original + 1 if self._long else None

    def row_lengths(self, start: int, count: int, *, prompt_length: int, total: int) -> list[int]:
        """The length that counts for each of the rows `start` to `start + count` of a sequence of `total` tokens.

        It does not depend on how the rows are cut into steps: `longrope` rows all go by the whole sequence, `dynamic`
        ones by the prompt and, behind it, by their own position, as a sequence decoded alone would.
        """
        if self._long:
            return [total] * count
        return [max(position + 1, prompt_length) for position in range(start, start + count)]

    def _per_length(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        """Positions [1, T] to what the rotary module returns for them, each row by its own length."""
        classes = torch.tensor(self.lengths, device=position_ids.device)
        classes = classes.where(classes > self._original, self._original)
        parts = []
        for length in sorted(set(classes.tolist())):
            rows = (classes == length).nonzero().squeeze(1)
            parts.append((rows, self._alone(x, position_ids[:, rows], length)))
        if isinstance(parts[0][1], tuple):
            columns = range(len(parts[0][1]))
            return tuple(_scatter([(rows, part[i]) for rows, part in parts]) for i in columns)
        return _scatter(parts)

    def _alone(self, x: torch.Tensor, position_ids: torch.Tensor, length: int) -> Any:
        """Rows of sequences of `length` tokens: one more row at the last position tells the module so."""
        rotary = self._rotary
        if not self._long:  # `dynamic` remembers the longest sequence it has seen: forget it
            rotary.max_seq_len_cached = rotary.original_max_seq_len
            rotary.inv_freq = rotary.original_inv_freq
        last = position_ids.new_full((1, 1), length - 1)
        out = self._forward(x, torch.cat((position_ids, last), dim=1))
        return tuple(part[:, :-1] for part in out) if isinstance(out, tuple) else out[:, :-1]


def _scatter(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Rows' numbers and values [1, n, D] of each part, put back in order: [1, T, D]."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.cat([rows for rows, _ in parts])
    return torch.cat([values for _, values in parts], dim=1)[:, order.argsort()]
