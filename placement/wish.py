"""How many copies and replicas a method wants, as if every replica could be there at once. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from placement.arrays import Bools, Floats, Ints
from placement.baselines.counts import baseline_counts
from placement.fleet import Fleet
from placement.grid import Grid
from placement.plan import Copy
from placement.problem import Demand
from placement.scaler import Scale, scale
from placement.settings import PlacementSettings, RoundSettings
from placement.work import work_seconds

_LEAST_GAIN = 0.05
"""Without a budget, a copy must save this part of a layer's time."""
_EXACT = 1 - 1e-9


@dataclass(frozen=True, eq=False, slots=True)
class Wish:
    """What a method wants."""

    copies: Ints
    """[L, E] of each slice"""
    units: Ints
    """[U] replicas of each unit"""
    least: Ints
    most: Ints
    """[U] replicas that the operator wants, and allows"""
    relief: Floats
    """[U] how many times longer a unit's busiest copy takes with the replicas asked for so far than is planned; inf:
    there must be more."""
    work: Floats
    """[L, E] seconds of a step on one replica"""
    scale: Scale | None
    """How our own method got there; None: another method's wish."""
    placement: PlacementSettings
    """For the placer"""


class Wishes:
    """Makes wishes for one model."""

    def __init__(self, grid: Grid, slice_bytes: int, settings: RoundSettings) -> None:
        self._grid, self._bytes, self._settings = grid, slice_bytes, settings
        self._least, self._most = grid.bounds(settings)

    def wish(
        self, demand: Demand, fleet: Fleet, planned: Mapping[str, Sequence[Copy]], *, idle: Bools, now: Ints
    ) -> Wish:
        """The wish for `demand`, where `now` [U] replicas are asked for; `idle` [L, E] slices keep their least."""
        grid, work = self._grid, work_seconds(fleet.speed, demand.high)
        most = np.where(idle, self._least, self._most)
        least_units, most_units = grid.most(self._least), np.maximum(grid.most(self._most), 1)
        placement = self._placement(most, work)
        if self._settings.elastic:
            startable = np.maximum(most_units - fleet.counts, 0)
            scaled = scale(fleet.problem(demand, planned, startable), placement)
            units, relief = self._replicas(scaled, fleet.slots, now)
            return Wish(scaled.copies, units, least_units, most_units, relief, work, scaled, placement)
        copies = self._baseline(demand, fleet)
        units = grid.most(copies)
        return Wish(copies, units, least_units, most_units, np.full(len(units), np.inf), work, None, placement)

    def _placement(self, most: Ints, work: Floats) -> PlacementSettings:
        given = self._settings.placement
        gain = 0.0
        if given.max_bytes is None:
            gain = _LEAST_GAIN * float((work.max(axis=1, initial=0.0) + self._settings.near_s).mean())
        return dataclasses.replace(given, min_copies=self._least, max_copies=most, least_gain_s=gain)

    def _replicas(self, scaled: Scale, slots: Ints, now: Ints) -> tuple[Ints, Floats]:
        """[U] replicas for the slice with most copies, for the work in every layer and for memory; their relief."""
        grid = self._grid
        held = scaled.copies > 0
        busy = grid.by_layer(scaled.work * held)
        parts = grid.by_layer((scaled.parts * held).astype(np.float64)).astype(np.int64)
        target = np.maximum(scaled.target, 1e-300)[:, None]
        by_copies, by_memory = grid.most(scaled.copies), -(-grid.sum(scaled.copies) // np.maximum(slots, 1))
        by_work = np.minimum(np.ceil(busy / target * _EXACT).astype(np.int64), parts).max(axis=0, initial=0)
        share = np.maximum(np.minimum(now, parts), 1)
        relief = (busy / share / target).max(axis=0, initial=0.0)
        alone = (now < 2) & (grid.most((scaled.spread & (scaled.copies > 1)).astype(np.int64)) > 0)
        must = (now < 1) | (now < by_memory) | alone
        return np.max([by_copies, by_work, by_memory], axis=0), np.where(must, np.inf, relief)

    def _baseline(self, demand: Demand, fleet: Fleet) -> Ints:
        layers, experts = demand.high.shape
        if self._settings.method == "static":
            return np.full(demand.high.shape, self._settings.replicas)
        memory, settings = self._settings.placement.max_bytes, self._settings
        always = experts * max(1, settings.replicas)
        slots = always if memory is None else memory // self._bytes // max(layers, 1)
        nodes = len({each.node for each in fleet.replicas}) or 1
        return baseline_counts(settings.method, demand, slots, self._most, nodes)
