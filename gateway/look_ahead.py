"""What a layer's router would choose from another layer's input: a forecast of the next MoE layer, one layer ahead."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn

from gateway.routed import RoutedLayer, RoutedStep

log = logging.getLogger(__name__)

_ALIKE = 0.75
"""Rows on which a router asked again must choose what it chose in its layer: another rounding changes some."""
_ENOUGH = 16
"""Rows that tell."""


class Gates:
    """The routers of a model's MoE layers, each asked alone: rows [T, H] to the experts it would choose [T, K].

    Families call their routers in many ways. A router that can't be called with rows alone, or says something else than
    it does in its own layer, is not asked again.
    """

    def __init__(self, network: nn.Module, experts: Mapping[int, nn.Module], top_k: int) -> None:
        """`experts` are the experts modules by layer, as `experts.families.moe_modules` finds them."""
        self._top_k = top_k
        self._routers = {layer: _routers(network, module) for layer, module in experts.items()}
        self._settled: set[int] = set()

    def works(self, layer: int) -> bool:
        """Whether the layer's router may still be asked."""
        return bool(self._routers[layer])

    @torch.inference_mode()
    def choose(self, layer: int, rows: torch.Tensor) -> torch.Tensor | None:
        """The experts that the router of `layer` would choose [T, K]; None where it can't be asked."""
        for router in self._routers[layer]:
            chosen = self._ask(router, rows)
            if chosen is not None:
                self._routers[layer] = [router]
                return chosen
        self._routers[layer] = []
        return None

    def trust(self, layer: int, rows: torch.Tensor, chosen: torch.Tensor) -> bool:
        """Whether the router of `layer` says of its own rows [T, H] what it `chose` [T, K]; settled by a few rows."""
        if layer not in self._settled and (len(rows) >= _ENOUGH or not self.works(layer)):
            said = self.choose(layer, rows)
            if said is None or not _alike(said, chosen):
                log.info("the router of layer %d can't be asked outside of it: no look-ahead there", layer)
                self._routers[layer] = []
            self._settled.add(layer)
        return layer in self._settled and self.works(layer)

    def _ask(self, router: nn.Module, rows: torch.Tensor) -> torch.Tensor | None:
        try:
            answer = router(rows)
        except Exception:  # modeling code of any family, called in a way it may not be meant for
            return None
        parts = answer if isinstance(answer, tuple) else (answer,)
        shape = (len(rows), self._top_k)
        found = [part for part in parts if isinstance(part, torch.Tensor) and part.shape == shape]
        return next((part for part in found if not part.is_floating_point()), None)


def look_ahead(gates: Gates, layers: Sequence[int], steps: Sequence[RoutedStep]) -> None:
    """Ask each layer's router about the inputs of the layer above it, all `steps` at once, and let the inputs go."""
    kept = [step for step in steps if step.layers[layers[0]].rows is not None]
    if not kept:
        return
    rows = {layer: _joined([step.layers[layer].rows for step in kept]) for layer in layers}
    sizes = [step.rows for step in kept]
    for before, layer in pairwise(layers):
        own = _joined([step.layers[layer].chosen for step in kept])
        said = gates.choose(layer, rows[before]) if gates.trust(layer, rows[layer], own) else None
        parts = [None] * len(kept) if said is None else torch.split_with_sizes(said, sizes)
        for step, part in zip(kept, parts, strict=True):
            step.layers[before] = RoutedLayer(step.layers[before].chosen, None, part)


def _joined(parts: list[torch.Tensor | None]) -> torch.Tensor:
    return torch.cat([part for part in parts if part is not None])


def _routers(network: nn.Module, experts: nn.Module) -> list[nn.Module]:
    """What stands beside the experts and may be their router: it has a row of weights for each expert."""
    for module in network.modules():
        children = list(module.children())
        if any(child is experts for child in children):
            return [child for child in children if child is not experts and _has_row_for_each(child, experts)]
    return []


def _has_row_for_each(module: nn.Module, experts: nn.Module) -> bool:
    return any(parameter.ndim == 2 and len(parameter) == experts.num_experts for parameter in module.parameters())


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    same = (one.sort(-1).values == other.sort(-1).values.to(one.device)).all(-1)
    return same.float().mean().item() >= _ALIKE
