"""The products with fixed weights that a gateway and its replicas consist of: plain, or as fast as can be.

Multiplying few rows takes as long as reading the weights. Our own kernel reads them where they lie, at the speed of
memory. Where it is not built, oneDNN's packed layout comes next, about twice as fast as a plain product; its copy of
the weights is memory of this process alone.
"""

import torch
from torch.nn import functional as F

from experts import kernels
from experts.mapped import discard, populate

_PACKABLE = (torch.bfloat16, torch.float32)


class PlainMatrix:
    """`rows @ weight.T + bias` for `weight [out, in]` as it lies in memory, and `bias [out]` or None."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.out_features = weight.shape[0]
        self.bias = bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[..., in]` to `[..., out]`."""
        return F.linear(rows, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        """Memory that reading the weights takes."""
        return self.weight.nbytes

    def make_ready(self) -> None:
        """Bring the weights, which are memory-mapped, to where they are read."""
        populate(self.weight)


class FastMatrix(PlainMatrix):
    """The same by the compiled kernel, or else with a packed copy of the weights; only for what is `packable`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__(weight.contiguous(), bias)
        self._copied = self.weight is not weight
        self._packed: torch.Tensor | None = None
        if not kernels.multiplies(self.weight):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, 1)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[..., in]` to `[..., out]`."""
        if self.streams(rows):
            return kernels.product(rows, self.weight, self.bias)
        if self._packed is None:
            return F.linear(rows, self.weight, self.bias)
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed, self.bias, "none", [], "")
        return result

    @property
    def nbytes(self) -> int:
        """Memory that reading the weights takes."""
        return self.weight.nbytes * (2 if self._packed is not None and self._copied else 1)

    def make_ready(self) -> None:
        """Bring the weights, which are memory-mapped, to where they are read; not what only made the packed copy."""
        if self._packed is None:
            populate(self.weight)
        elif not self._copied:
            discard(self.weight)

    def streams(self, rows: torch.Tensor) -> bool:
        """Whether the compiled kernel multiplies `rows`; once it is there, nothing needs a packed copy."""
        if not kernels.multiplies(self.weight):
            return False
        self._packed = None
        return rows.dtype == self.weight.dtype and kernels.few(rows.numel() // self.weight.shape[1])


def packable(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a layout of its own for `weight`."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in _PACKABLE
        and weight.numel() > 0
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and (weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
