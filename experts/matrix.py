"""The products with fixed weights that a gateway and its replicas consist of: plain, or packed.

On a CPU oneDNN reads weights blocked by its own vector width: multiplying few rows by a packed matrix runs at the
speed of memory, about twice as fast as by a plain one. The packed copy is memory of this process alone.
"""

import torch
from torch.nn import functional as F

_PACKABLE = (torch.bfloat16, torch.float32)


class PlainMatrix:
    """`rows @ weight.T + bias` for `weight [out, in]` as it lies in memory, and `bias [out]` or None."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.out_features = weight.shape[0]
        self._bias = bias

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[..., in]` to `[..., out]`."""
        return F.linear(rows, self.weight, self._bias)


class PackedMatrix:
    """The same with a copy of the weights in the kernel's own layout; only for what is `packable`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.out_features = weight.shape[0]
        self.bias = bias
        self.weight: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[..., in]` to `[..., out]`."""
        result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return result


def packable(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a layout of its own for `weight`."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in _PACKABLE
        and weight.numel() > 0
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and (weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
