"""The model's own attention masks as rules, evaluated where the rows of many sequences are known.

transformers builds a mask from a function of (batch, head, query position, key position). Registered under our name,
`mask_rule` keeps that function instead of a tensor over the flattened rows, and attention asks it sequence by sequence:
causal, sliding and chunked patterns all come from the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function

MaskFunction = Callable[[Any, Any, torch.Tensor, torch.Tensor], torch.Tensor]


class MaskRule:
    """Which keys a query may see, by absolute positions."""

    def __init__(self, function: MaskFunction) -> None:
        self._function = function
        self.is_causal = function is causal_mask_function
        """Nothing but the order of positions decides."""

    def allowed(self, positions: torch.Tensor, keys: int) -> torch.Tensor:
        """Booleans [B, n, keys]: what queries at `positions` [B, n] may see; never a key behind the query."""
        query = positions[:, :, None]
        key = torch.arange(keys, device=positions.device)[None, None, :]
        ordered = key <= query  # slots behind the query hold nothing of this sequence
        if self.is_causal:
            return ordered
        batch = torch.arange(positions.shape[0], device=positions.device)[:, None, None]
        return ordered & self._function(batch, torch.zeros_like(batch), query, key)


def mask_rule(*, mask_function: MaskFunction, **_: Any) -> MaskRule:
    """transformers' mask interface: keep the function, build nothing."""
    return MaskRule(mask_function)
