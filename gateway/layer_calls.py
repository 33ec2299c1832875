"""A model's side of its compiled layers' calls (see `gateway.layer_ops`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from gateway.attention import Attending
from gateway.masks import MaskRule
from gateway.packed_linear import number_products

ExpertsFunction = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, hidden [T, H], top_k_index [T, K], top_k_weights [T, K]) to the weighted sum of the experts' rows [T, H]"""


class LayerCalls:
    """Answers for the decoder layers `layers`, in the order of their numbers."""

    def __init__(self, layers: Sequence[nn.Module], experts: ExpertsFunction) -> None:
        self.answer = experts
        self.step: Attending | None = None
        """Attention of the step under way."""
        self._products = [number_products(layer) for layer in layers]
        self._rules: dict[int, MaskRule] = {}

    @contextmanager
    def answered_by(self, experts: ExpertsFunction) -> Iterator[None]:
        """`experts` stand in for those that serve, meanwhile."""
        self.answer, served = experts, self.answer
        try:
            yield
        finally:
            self.answer = served

    def linear(self, layer: int, slot: int, rows: torch.Tensor) -> torch.Tensor:
        """See `gateway.layer_ops.Callbacks`."""
        return self._products[layer][slot](rows)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `gateway.layer_ops.Callbacks`."""
        assert self.step is not None
        return self.step.attend(layer, query, keys, values, self._rules[layer], scaling, sinks)

    def experts(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `gateway.layer_ops.Callbacks`."""
        return self.answer(layer, hidden, index, weights)

    def note_rule(self, layer: int, rule: MaskRule) -> None:
        """What the layer's next rows may see."""
        self._rules[layer] = rule
