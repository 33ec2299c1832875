"""Slices of a model as [L, E] arrays, and the units that hold them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from placement.arrays import Bools, Floats, Ints
from placement.settings import RoundSettings
from placement.unit import Unit


@dataclass(frozen=True, eq=False, slots=True)
class Grid:
    """Where each slice is. L layers, E experts, U units."""

    units: tuple[Unit, ...]
    layers: tuple[int, ...]
    """[L] their numbers in the model."""
    unit: Ints
    """[L, E] the unit of each slice."""
    place: dict[int, int]
    """Layer's number -> its row."""
    index: dict[str, int]
    """Unit's name -> its number."""

    @classmethod
    def of(cls, units: Sequence[Unit], layers: Sequence[int], experts: int) -> Grid:
        """The grid of a model that is cut into `units`."""
        place = {layer: row for row, layer in enumerate(layers)}
        unit = np.zeros((len(layers), experts), dtype=np.int64)
        for number, each in enumerate(units):
            unit[np.ix_([place[layer] for layer in each.layers], each.experts)] = number
        index = {each.name: number for number, each in enumerate(units)}
        return cls(tuple(units), tuple(layers), unit, place, index)

    def most(self, values: Ints) -> Ints:
        """[U] the largest of `values` [L, E] in each unit; at least 0."""
        most = np.zeros(len(self.units), dtype=np.int64)
        np.maximum.at(most, self.unit, values)
        return most

    def sum(self, values: Ints) -> Ints:
        """[U] the sum of `values` [L, E] in each unit."""
        sums = np.bincount(self.unit.reshape(-1), weights=values.reshape(-1), minlength=len(self.units))
        return sums.astype(np.int64)

    def by_layer(self, values: Floats) -> Floats:
        """[L, U] the sum of `values` [L, E] in each layer of each unit."""
        layers, units = len(self.layers), len(self.units)
        cells = np.arange(layers)[:, None] * units + self.unit
        sums = np.bincount(cells.reshape(-1), weights=values.reshape(-1), minlength=layers * units)
        return sums.astype(np.float64).reshape(layers, units)

    def chosen(self, layers: Collection[int] | None, experts: Collection[int] | None) -> Bools:
        """[L, E] the slices of some layers (by number) and experts; None: of all."""
        row = np.isin(self.layers, list(self.layers if layers is None else layers))
        numbers = range(self.unit.shape[1])
        column = np.isin(numbers, list(numbers if experts is None else experts))
        both: Bools = row[:, None] & column
        return both

    def bounds(self, settings: RoundSettings) -> tuple[Ints, Ints]:
        """[L, E] least and most copies of each slice, by the operator's policy."""
        least = np.full(self.unit.shape, settings.min_replicas)
        most = np.full(self.unit.shape, settings.max_replicas)
        for override in settings.overrides:
            there = self.chosen(override.layers, override.experts)
            if override.min_replicas is not None:
                least[there] = override.min_replicas
            if override.max_replicas is not None:
                most[there] = override.max_replicas
            if override.pin:
                least[there] = np.maximum(least[there], 1)
        return least, np.maximum(least, most)

    def least(self, values: Floats) -> Floats:
        """[U] the least of `values` [L, E] in each unit."""
        least = np.full(len(self.units), np.inf)
        np.minimum.at(least, self.unit, values)
        return least
