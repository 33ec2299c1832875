"""The experts that a gateway computes itself: how many rows, how much memory, and what is let go again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from experts.ffn import ExpertFFN

KEEP_S = 10.0


class Inline(Protocol):
    """What dispatch asks of it; see `experts.ffn.ExpertFFN`."""

    def compute(  # noqa: D102
        self, layer: int, segments: Sequence[tuple[int, int]], rows: torch.Tensor, out: torch.Tensor
    ) -> None: ...

    def mixture(  # noqa: D102
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None: ...


class InlineExperts:
    """An `ExpertFFN` whose slices are released when they were not needed for a while.

    The engine's thread computes; any other may load, `tidy` and read the figures.
    """

    def __init__(
        self, ffn: ExpertFFN, *, keep_s: float | None = KEEP_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`keep_s`: a slice is kept for so long after its last row; None keeps all."""
        self.rows = 0
        """Rows computed since the start."""
        self._ffn = ffn
        self._keep_s = keep_s
        self._clock = clock
        self._used: dict[tuple[int, int], float] = {}
        self._whole_used: dict[int, float] = {}

    @property
    def resident_bytes(self) -> int:
        """Memory of the weights that are held now."""
        return self._ffn.resident_bytes

    def load(self, layer: int, expert: int) -> None:
        """Load a slice before it is asked for."""
        self._ffn.load(layer, expert)

    def compute(self, layer: int, segments: Sequence[tuple[int, int]], rows: torch.Tensor, out: torch.Tensor) -> None:
        """See `ExpertFFN.compute`."""
        now = self._clock()
        for expert, _ in segments:
            self._used[layer, expert] = now
        self.rows += len(rows)
        self._ffn.compute(layer, segments, rows, out)

    def mixture(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """See `ExpertFFN.mixture`."""
        summed = self._ffn.mixture(layer, hidden, index, weights)
        if summed is not None:
            self.rows += index.numel()
            self._whole_used[layer] = self._clock()  # it takes all experts of the layer together
        return summed

    def tidy(self) -> None:
        """Release what has not been needed lately."""
        if self._keep_s is None:
            return
        now = self._clock()
        loaded = self._ffn.loaded
        for slice_ in loaded:
            self._used.setdefault(slice_, now)
        idle = [
            (layer, expert)
            for layer, expert in loaded
            if now - max(self._used[layer, expert], self._whole_used.get(layer, 0.0)) > self._keep_s
        ]
        self._ffn.unload(idle)
        for slice_ in idle:
            self._used.pop(slice_, None)
