"""Expert units: how a model's slices (layer, expert) are cut into deployments."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from placement.policy import UnitPolicy


@dataclasses.dataclass(frozen=True)
class Unit:
    """The slices one deployment serves: every expert of `experts` in every layer of `layers`."""

    name: str
    experts: tuple[int, ...]
    layers: tuple[int, ...]


def make_units(policy: UnitPolicy, experts: int, layers: Sequence[int]) -> list[Unit]:
    """Cut `experts` experts in the model's MoE `layers` into units; each slice is in exactly one."""
    grain = len(layers) if policy.layers == "all" else policy.layers
    return [
        Unit(_name(chosen, rows, len(rows) == len(layers)), chosen, rows)
        for chosen in _chunks(range(experts), policy.experts)
        for rows in _chunks(layers, grain)
    ]


def _chunks(items: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(items[start : start + size]) for start in range(0, len(items), size)]


def _name(experts: tuple[int, ...], layers: tuple[int, ...], all_layers: bool) -> str:
    name = "expert-" + _span(experts)
    return name if all_layers else f"{name}.layer-{_span(layers)}"


def _span(items: tuple[int, ...]) -> str:
    return str(items[0]) if len(items) == 1 else f"{items[0]}-{items[-1]}"
