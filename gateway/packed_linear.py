"""The linears of transformers' modeling code, replaced by packed ones: same numbers, half the time for few rows.

Linears that read the same rows (query, key and value projections; gate and up of a dense layer) become one product.
Which ones do is not guessed from names: the probe run sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from experts.mapped import populate
from experts.matrix import FastMatrix, packable
from gateway import layer_ops


class LayerProduct:
    """A packed matrix; while its layer is traced, the operator that stands for it."""

    def __init__(self, matrix: FastMatrix) -> None:
        self.matrix = matrix
        populate(matrix.weight)
        self.slot = 0

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[..., in]` to `[..., out]`."""
        layer = layer_ops.traced_layer()
        if layer is None:
            return self.matrix(rows)
        return layer_ops.traced_linear(rows, layer, self.slot, self.matrix.out_features)


class PackedLinear(nn.Module):
    """In place of an `nn.Linear`: rows `[..., in]` to `[..., out]`, alone or as one of a `SharedInput`'s."""

    def __init__(
        self, linear: nn.Linear, whole: LayerProduct, product: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        """`whole` is the product, of which `product` gives this linear's part."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Modeling code may look at these (their dtype, mostly); memory-mapped, they take no memory.
        self.weight, self.bias = linear.weight, linear.bias
        self.whole = whole
        self._product = product or whole

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return self._product(rows)


class SharedInput:
    """One product for several linears that are called with the very same tensor, one after the other."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        bias = None
        if any(linear.bias is not None for linear in linears):
            bias = torch.cat([_bias(linear) for linear in linears])
        self.whole = LayerProduct(FastMatrix(torch.cat([linear.weight for linear in linears]), bias))
        self._sizes = [linear.out_features for linear in linears]
        self._rows: torch.Tensor | None = None
        self._parts: tuple[torch.Tensor, ...] = ()

    def part(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The product of the linear number `index`."""

        def product(rows: torch.Tensor) -> torch.Tensor:
            if index == 0 or rows is not self._rows:
                self._rows, self._parts = rows, torch.split_with_sizes(self.whole(rows), self._sizes, dim=-1)
            part = self._parts[index]
            if index == len(self._sizes) - 1:
                self._rows, self._parts = None, ()
            return part

        return product


def pack_linears(network: nn.Module, run: Callable[[], object]) -> None:
    """Replace the linears of `network` that a packed layout helps; `run` calls its forward once, to see who shares."""
    linears = {name: module for name, module in network.named_modules() if type(module) is nn.Linear}
    linears = {name: module for name, module in linears.items() if packable(module.weight)}
    for names in _sharing(linears, run):
        group = [linears[name] for name in names]
        if len(group) == 1:
            product = LayerProduct(FastMatrix(group[0].weight, group[0].bias))
            _replace(network, names[0], PackedLinear(group[0], product))
            continue
        shared = SharedInput(group)
        for index, name in enumerate(names):
            _replace(network, name, PackedLinear(group[index], shared.whole, shared.part(index)))


def number_products(layer: nn.Module) -> list[LayerProduct]:
    """The products of a decoder layer, in order, each told its place."""
    products = list(dict.fromkeys(m.whole for m in layer.modules() if isinstance(m, PackedLinear)))
    for slot, product in enumerate(products):
        product.slot = slot
    return products


def _sharing(linears: dict[str, nn.Linear], run: Callable[[], object]) -> Iterable[list[str]]:
    """Names in groups: those of one parent that were called one after the other with the same tensor."""
    calls: list[tuple[str, torch.Tensor]] = []
    with _watching(linears, lambda name, rows: calls.append((name, rows))):
        run()
    groups: list[list[str]] = []
    before: tuple[str, torch.Tensor] | None = None
    for name, rows in calls:
        near = before is not None and before[1] is rows and _parent(before[0]) == _parent(name)
        if near and name not in groups[-1]:
            groups[-1].append(name)
        else:
            groups.append([name])
        before = name, rows
    seen = [name for group in groups for name in group]
    return [group for group in groups if all(seen.count(name) == 1 for name in group)]  # called once: no surprises


@contextmanager
def _watching(linears: dict[str, nn.Linear], note: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor]], None]:
        return lambda module, args: note(name, args[0])

    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _bias(linear: nn.Linear) -> torch.Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    network.get_submodule(_parent(name)).register_module(name.rpartition(".")[2], module)
