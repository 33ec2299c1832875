"""How many copies and replicas a method wants, as if every replica could be there at once. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from placement.arrays import Bools, Floats, Ints
from placement.baselines.counts import baseline_counts
from placement.fleet import Fleet
from placement.grid import Grid
from placement.problem import Demand
from placement.scaler import Scale, scale
from placement.settings import PlacementSettings, RoundSettings
from placement.work import work_seconds

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
        always = grid.unit.size * max(1, settings.replicas) * slice_bytes
        given = settings.placement
        budget = always if given.max_bytes is None else given.max_bytes
        self._placement = dataclasses.replace(given, max_bytes=budget, min_copies=self._least)
        self._copies: Ints | None = None

    def wish(self, demand: Demand, fleet: Fleet, *, idle: Bools, now: Ints) -> Wish:
        """The wish for `demand`, where `now` [U] replicas are asked for; `idle` [L, E] slices keep their least."""
        grid, work = self._grid, work_seconds(fleet.speed, demand.high)
        least_units, most_units = grid.most(self._least), np.maximum(grid.most(self._most), 1)
        placement = dataclasses.replace(self._placement, max_copies=np.where(idle, self._least, self._most))
        if self._settings.elastic:
            startable = np.maximum(most_units - fleet.counts, 0)
            scaled = self._steady(scale(fleet.problem(demand, startable), placement), placement)
            units, relief = self._replicas(scaled, fleet.slots, now)
            return Wish(scaled.copies, units, least_units, most_units, relief, work, scaled, placement)
        copies = self._baseline(demand, fleet)
        units = grid.most(copies)
        return Wish(copies, units, least_units, most_units, np.full(len(units), np.inf), work, None, placement)

    def _steady(self, scaled: Scale, placement: PlacementSettings) -> Scale:
        """The last wish again, where it is good enough: layers that are alike would take turns with the memory."""
        last, self._copies = self._copies, scaled.copies
        if last is None or last.sum() > scaled.copies.sum() or ((last > 0) != (scaled.copies > 0)).any():
            return scaled
        if (last > placement.max_copies).any() or (last < placement.min_copies).any():
            return scaled
        before, after = _largest(scaled, last), _largest(scaled, scaled.copies)
        if before.sum() > after.sum() * placement.imbalance:
            return scaled
        self._copies = last
        return dataclasses.replace(scaled, copies=last, target=before)

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
        first = -(-grid.sum(held.astype(np.int64)) // np.maximum(slots, 1))
        must = (now < np.maximum(first, 1)) | alone
        return np.max([by_copies, by_work, by_memory], axis=0), np.where(must, np.inf, relief)

    def _baseline(self, demand: Demand, fleet: Fleet) -> Ints:
        method, budget = self._settings.method, self._placement.max_bytes or 0
        if method == "static":
            return np.full(demand.high.shape, self._settings.replicas)
        slots = budget // self._bytes // max(len(demand.high), 1)
        nodes = len({each.node for each in fleet.replicas}) or 1
        return baseline_counts(method, demand, slots, self._most, nodes)


def _largest(scaled: Scale, copies: Ints) -> Floats:
    """[L] seconds of each layer's largest copy."""
    each = scaled.work * (copies > 0) / np.clip(copies, 1, scaled.parts)
    largest: Floats = each.max(axis=1, initial=0.0)
    return largest
