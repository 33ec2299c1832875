"""A layer's rows laid out for those who compute them: side by side, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from experts import kernels
from gateway.assignment import Part


def lay_out(hidden: torch.Tensor, index: torch.Tensor, parts: Sequence[Part], out: torch.Tensor) -> torch.Tensor:
    """Copy row t of ``hidden [T, H]`` to ``out [T * K, H]`` for each of its experts ``index [T, K]``, part by part.

    Returns where in `out` the k-th of row t is: at ``[t * K + k]``. `index` is on the CPU; `parts` cover each row once.
    """
    if kernels.loaded() and hidden.device.type == out.device.type == "cpu":
        flat = list(chain.from_iterable(parts))
        place: torch.Tensor = torch.ops.evermoe.lay_out.default(hidden.contiguous(), index.contiguous(), flat, out)
        return place
    order = np.argsort(index.numpy().reshape(-1), kind="stable")
    laid = order[np.concatenate([np.arange(part.start, part.start + part.rows) for part in parts])]
    source = torch.from_numpy(laid // index.shape[1]).to(hidden.device)
    if hidden.device == out.device:
        torch.index_select(hidden, 0, source, out=out)
    else:
        out.copy_(hidden.index_select(0, source))
    where = np.empty_like(laid)
    where[laid] = np.arange(len(laid))
    return torch.from_numpy(where)
