"""What a planning round is given: rows to expect, devices that live, copies they hold. Plain data, checked once.

L layers, E experts, D devices, C copies. A *slice* is (layer, expert); a *copy* of it is held by one device. Sizes of
slices are alike, so memory is counted in whole slices (`Problem.slots`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from placement.arrays import Bools, Floats, Ints
from placement.cost import Speed


class ProblemError(ValueError):
    """What was given contradicts itself; the message names the part and what it should be."""


@dataclass(frozen=True, eq=False, slots=True)
class Demand:
    """The rows that slices are expected to get in one step of the gateways."""

    rows: Floats
    """[L, E] mean rows of a step: what keeping a slice is worth is judged by these."""
    high: Floats
    """[L, E] rows at the head-room quantile: what capacity is planned for."""
    steps_per_s: float
    """Steps in a second, of all gateways."""

    @classmethod
    def of(cls, rows: ArrayLike, high: ArrayLike | None = None, steps_per_s: float = 1.0) -> Demand:
        """Demand of rows in a step (divide those of a window by its steps); without `high` there is no head-room."""
        mean = np.asarray(rows, dtype=np.float64)
        top = mean if high is None else np.asarray(high, dtype=np.float64)
        if mean.ndim != 2 or mean.shape != top.shape:
            raise ProblemError(f"rows and high are [layers, experts] alike, not {mean.shape} and {top.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(top).all() and mean.min(initial=0) >= 0 and steps_per_s >= 0):
            raise ProblemError("rows and steps_per_s are finite and at least 0")
        return cls(mean, np.maximum(mean, top), steps_per_s)


@dataclass(frozen=True, eq=False, slots=True)
class Devices:
    """Where slices can be held: live replicas, or the devices below them."""

    speed: Floats
    """[D] rows per second relative to the device that `Problem.speed` describes."""
    memory_bytes: Ints
    """[D] what slices may take, in all layers together."""
    node: Ints
    """[D] the host that a device is lost with."""
    call_s: Floats
    """[D] what a call costs beside its rows: small on the gateway's host, larger across the network."""
    unit: Ints
    """[D] the expert unit whose slices it may hold; -1 holds any."""

    def __len__(self) -> int:
        return len(self.speed)

    @classmethod
    def of(
        cls,
        memory_bytes: ArrayLike,
        speed: ArrayLike = 1.0,
        node: ArrayLike = 0,
        call_s: ArrayLike = 0.0,
        unit: ArrayLike = -1,
    ) -> Devices:
        """Devices with so much memory each; what is given as one number holds for all of them."""
        memory = np.atleast_1d(np.asarray(memory_bytes, dtype=np.int64))

        def each(given: ArrayLike, kind: type) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
            return np.broadcast_to(np.asarray(given, dtype=kind), memory.shape)

        devices = cls(
            each(speed, float),
            memory,
            each(node, int).astype(np.int64),
            each(call_s, float),
            each(unit, int).astype(np.int64),
        )
        if len(devices) and (devices.speed.min() <= 0 or memory.min() < 0 or devices.call_s.min() < 0):
            raise ProblemError("devices have speeds above 0, memory and call_s of at least 0")
        return devices


@dataclass(frozen=True, eq=False, slots=True)
class Copies:
    """Which device holds which slice, and what part of its rows it gets; sorted by layer, expert, device."""

    layer: Ints
    expert: Ints
    device: Ints
    share: Floats
    """[C] parts of a slice's rows: they sum to one over its copies; a copy in reserve has 0."""

    def __len__(self) -> int:
        return len(self.layer)

    @classmethod
    def of(cls, layer: ArrayLike, expert: ArrayLike, device: ArrayLike, share: ArrayLike | None = None) -> Copies:
        """Copies in any order; without shares they are all 0 (what is resident needs none)."""
        columns = [np.asarray(column, dtype=np.int64).reshape(-1) for column in (layer, expert, device)]
        parts = np.zeros(len(columns[0])) if share is None else np.asarray(share, dtype=np.float64).reshape(-1)
        height, width = (int(column.max(initial=0)) + 1 for column in columns[1:])
        order = np.argsort((columns[0] * height + columns[1]) * width + columns[2])
        return cls(columns[0][order], columns[1][order], columns[2][order], parts[order])

    @classmethod
    def none(cls) -> Copies:
        """Nothing is held."""
        return cls.of([], [], [])

    @classmethod
    def of_sequence(cls, triples: Sequence[tuple[int, int, int]]) -> Copies:
        """Copies of (layer, expert, device)."""
        return cls.of(*zip(*triples, strict=True)) if triples else cls.none()

    def where(self, chosen: Bools) -> Copies:
        """Those of the copies that `chosen` [C] names."""
        return Copies(self.layer[chosen], self.expert[chosen], self.device[chosen], self.share[chosen])


@dataclass(frozen=True, eq=False, slots=True)
class Problem:
    """Everything one round decides upon."""

    demand: Demand
    devices: Devices
    slice_bytes: int
    speed: Speed
    """Of a device whose speed is 1."""
    inline: Speed
    """Of a gateway, which computes what nobody holds."""
    resident: Copies
    """What devices hold now."""
    unit: Ints
    """[L, E] the unit of each slice; matters to devices that are bound to one."""

    @classmethod
    def of(
        cls,
        demand: Demand,
        devices: Devices,
        *,
        slice_bytes: int,
        speed: Speed,
        inline: Speed | None = None,
        resident: Copies | None = None,
        unit: ArrayLike | None = None,
    ) -> Problem:
        """A checked problem; raise ProblemError where its parts don't fit. A gateway is as fast as a device."""
        shape = demand.rows.shape
        units = np.zeros(shape, dtype=np.int64) if unit is None else np.asarray(unit, dtype=np.int64)
        held = resident or Copies.none()
        if slice_bytes <= 0:
            raise ProblemError(f"slice_bytes is at least 1, not {slice_bytes}")
        if units.shape != shape:
            raise ProblemError(f"unit is [layers, experts] {shape} like rows, not {units.shape}")
        bounds = (*shape, len(devices))
        for name, column, bound in zip(
            ("layer", "expert", "device"), (held.layer, held.expert, held.device), bounds, strict=True
        ):
            if len(column) and not (column.min() >= 0 and column.max() < bound):
                raise ProblemError(f"resident copies name {name} {column.min()} to {column.max()}: there are {bound}")
        if len(set(np.sign(devices.unit + 0.5).tolist())) > 1:
            raise ProblemError("either all devices are bound to units or none is")
        return cls(demand, devices, slice_bytes, speed, inline or speed, held, units)

    @property
    def shape(self) -> tuple[int, int, int]:
        """L, E, D."""
        layers, experts = self.demand.rows.shape
        return layers, experts, len(self.devices)

    @property
    def slots(self) -> Ints:
        """[D] slices that fit on each device."""
        slots: Ints = self.devices.memory_bytes // self.slice_bytes
        return slots

    @property
    def bound(self) -> bool:
        """Whether devices hold slices of their own unit only."""
        return len(self.devices) > 0 and int(self.devices.unit[0]) >= 0

    def keys(self, copies: Copies) -> Ints:
        """[C] one number for each (layer, expert, device); rising, as copies are sorted."""
        _, experts, devices = self.shape
        keys: Ints = (copies.layer * experts + copies.expert) * devices + copies.device
        return keys


@dataclass(frozen=True, eq=False, slots=True)
class Assignment:
    """What a round decided: slices without a copy are computed inline."""

    copies: Copies
    added: Copies
    """Those of the copies that devices must load ..."""
    dropped: Copies
    """... and what they may forget. Everything else is where it was."""
    moved_bytes: int

    @classmethod
    def of(cls, problem: Problem, copies: Copies) -> Assignment:
        """The assignment that ends in `copies`."""
        after, before = problem.keys(copies), problem.keys(problem.resident)
        added = copies.where(~_among(after, before))
        dropped = problem.resident.where(~_among(before, after))
        return cls(copies, added, dropped, len(added) * problem.slice_bytes)


def _among(keys: Ints, others: Ints) -> Bools:
    """[C] which `keys` are among the `others`, both rising."""
    if not len(others):
        return np.zeros(len(keys), dtype=np.bool_)
    at = np.minimum(np.searchsorted(others, keys), len(others) - 1)
    found: Bools = others[at] == keys
    return found


def copy_counts(copies: Copies, layers: int, experts: int) -> Ints:
    """[L, E] how many copies each slice has."""
    flat = np.bincount(copies.layer * experts + copies.expert, minlength=layers * experts)
    return flat.reshape(layers, experts).astype(np.int64)
