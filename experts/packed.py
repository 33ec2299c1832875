"""Matrices laid out once for the kernel that multiplies with them.

On a CPU oneDNN reads weights blocked by its own vector width: multiplying few rows by a packed matrix runs at the
speed of memory, about twice as fast as by a plain one. The packed copy is memory of this process alone.
"""

import torch
from torch.nn import functional as F

_PACKABLE = (torch.bfloat16, torch.float32)


class PackedMatrix:
    """`rows @ weight.T + bias` for a fixed `weight [out, in]` and `bias [out]` or None."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Copy `weight` into the kernel's layout; where no such layout exists it is used as it is."""
        self.out_features = weight.shape[0]
        self.packed = packable(weight)
        self._bias = bias
        self._weight: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1) if self.packed else weight

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows `[..., in]` to `[..., out]`."""
        if self.packed:
            result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
            return result
        return F.linear(rows, self._weight, self._bias)


def packable(weight: torch.Tensor) -> bool:
    """Whether oneDNN has a layout of its own for `weight`."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in _PACKABLE
        and weight.numel() > 0
        and torch.backends.mkldnn.is_available()
        and (weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
