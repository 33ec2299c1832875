"""What is noted of a step while its layers run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from gateway.sequence import Sequence


class RoutedLayer(NamedTuple):
    """One MoE layer in a step of T rows."""

    chosen: torch.Tensor
    """[T, K]: experts its router chose"""
    rows: torch.Tensor | None
    """[T, H]: its input, until the next layer's router has been asked ..."""
    ahead: torch.Tensor | None
    """... [T, K]: what that chose; None where it can't be asked."""


@dataclass(slots=True)
class RoutedStep:
    """A step under way, then one that waits to be packed."""

    works: list[tuple[int, int, int]]
    """As in `gateway.routing_chunk.StepHead`."""
    token_ids: torch.Tensor
    rows: int
    size: int = 0
    """Bytes that are kept of it."""
    layers: dict[int, RoutedLayer] = field(default_factory=dict)
    time_s: float = 0.0
    running: list[tuple[int, int, int]] = field(default_factory=list)
    queue: list[tuple[Sequence, int, int]] = field(default_factory=list)
    """Sequences only ever grow, so these tokens are still there whenever the queue is packed."""
    waiting: int = 0
    waiting_tokens: int = 0
