"""A model's side of its compiled layers' calls (see `gateway.layer_ops`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from experts import kernels
from gateway import paged_decode
from gateway.attention import Attending, AttentionStep
from gateway.masks import MaskRule
from gateway.packed_linear import LayerProduct, number_products

ExpertsFunction = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, hidden [T, H], top_k_index [T, K], top_k_weights [T, K]) to the weighted sum of the experts' rows [T, H]"""


class LayerCalls:
    """Answers for the decoder layers `layers`, in the order of their numbers."""

    def __init__(self, layers: Sequence[nn.Module], experts: ExpertsFunction) -> None:
        self.answer = experts
        self.step: Attending | None = None
        """Attention of the step under way."""
        self._products = [number_products(layer) for layer in layers]
        self._weights: tuple[list[torch.Tensor], list[torch.Tensor], list[int]] | None = None
        """What `kernels.answer_products` takes."""
        self._handed_over = False
        self._rules: dict[int, MaskRule] = {}

    @contextmanager
    def answered_by(self, experts: ExpertsFunction) -> Iterator[None]:
        """`experts` stand in for those that serve, meanwhile."""
        self.answer, served = experts, self.answer
        try:
            yield
        finally:
            self.answer = served

    @contextmanager
    def answered_without_python(self) -> Iterator[None]:
        """As far as our kernels can, meanwhile, for compiled layers of this thread."""
        if kernels.loaded():
            self._weights = self._weights or _weights(self._products)
            kernels.answer_products(*self._weights)
        step = self.step
        if isinstance(step, AttentionStep):
            causal = {layer for layer, rule in self._rules.items() if rule.is_causal}
            self._handed_over = step.hand_over(len(self._products), causal)
        try:
            yield
        finally:
            self._take_back()
            if kernels.loaded():
                kernels.answer_products([], [], [])

    def _take_back(self) -> None:
        if self._handed_over:
            paged_decode.ask_python()
            self._handed_over = False

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
        before, self._rules[layer] = self._rules.get(layer), rule
        if before is not None and before.is_causal and not rule.is_causal:
            self._take_back()


def _weights(layers: Sequence[Sequence[LayerProduct]]) -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
    """Weights and biases of all products that the kernels do, and where each layer's begin."""
    weights, biases, first = [], [], [0]
    for products in layers:
        for product in products:
            matrix = product.matrix
            known = matrix.streams(matrix.weight[:1])
            weights.append(matrix.weight if known else matrix.weight.new_empty(0, 0))
            biases.append(matrix.weight.new_empty(0) if matrix.bias is None else matrix.bias.contiguous())
        first.append(len(weights))
    return weights, biases, first
