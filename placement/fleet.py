"""Live replicas as the devices of a Problem. Pure."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from placement.arrays import Floats, Ints
from placement.cost import Speed
from placement.grid import Grid
from placement.plan import Copy
from placement.problem import Copies, Demand, Devices, Problem
from placement.settings import RoundSettings
from placement.views import ReplicaView

_LIKE = 16.0
"""Times faster or slower than the others: more is a mistake of measuring."""


class Fleet:
    """Replicas, in the order of their ids, and how fast each is."""

    def __init__(
        self,
        grid: Grid,
        replicas: Sequence[ReplicaView],
        planned: Mapping[str, Sequence[Copy]],
        slice_bytes: int,
        settings: RoundSettings,
        inline: Speed,
    ) -> None:
        """Draining replicas, and those of units that are not there, don't count. `inline` is a gateway's speed.

        What `planned` asked of a replica counts as resident: it is being loaded.
        """
        own = [each for each in replicas if each.unit in grid.index and not each.draining]
        self.replicas = tuple(sorted(own, key=lambda each: each.id))
        self.unit: Ints = np.array([grid.index[each.unit] for each in self.replicas], dtype=np.int64)
        self.speed = _common(self.replicas, settings.device or inline)
        """Of a replica like most of them."""
        self._grid, self._planned, self._bytes = grid, planned, slice_bytes
        self._settings, self._inline = settings, inline
        self._size = np.bincount(grid.unit.reshape(-1), minlength=len(grid.units))

    @property
    def counts(self) -> Ints:
        """[U] replicas of each unit."""
        return np.bincount(self.unit, minlength=len(self._grid.units)).astype(np.int64)

    @property
    def slots(self) -> Ints:
        """[U] slices of a new replica of each unit."""
        most = self._settings.replica_bytes
        slots: Ints = self._size if most is None else np.minimum(self._size, most // self._bytes)
        return slots

    def oldest(self, counts: Ints) -> Fleet:
        """At most `counts` [U] of each unit: where there are more, Serve stops the newest."""
        kept: list[ReplicaView] = []
        left = counts.copy()
        for each in sorted(self.replicas, key=lambda each: (each.started_at, each.id)):
            number = self._grid.index[each.unit]
            if left[number] > 0:
                left[number] -= 1
                kept.append(each)
        if len(kept) == len(self.replicas):
            return self
        return Fleet(self._grid, kept, self._planned, self._bytes, self._settings, self._inline)

    def problem(self, demand: Demand, startable: Ints | None = None) -> Problem:
        """These devices, and so many more of each unit that are `startable` [U]."""
        more = np.zeros(len(self._grid.units), dtype=np.int64) if startable is None else startable
        new = np.repeat(np.arange(len(more)), more)
        nodes = sorted({each.node for each in self.replicas}) or [""]
        node = [nodes.index(each.node) for each in self.replicas] + [at % len(nodes) for at in range(len(new))]
        near, far = self._settings.near_s, self._settings.far_s
        devices = Devices.of(
            np.concatenate([self._memory(), self.slots[new] * self._bytes]),
            speed=np.concatenate([self._relative(demand), np.ones(len(new))]),
            node=np.array(node, dtype=np.int64),
            call_s=np.array([near if each.near else far for each in self.replicas] + [near] * len(new)),
            unit=np.concatenate([self.unit, new]),
        )
        return Problem.of(
            demand,
            devices,
            slice_bytes=self._bytes,
            speed=self.speed,
            inline=self._inline,
            resident=self._resident,
            unit=self._grid.unit,
        )

    def _memory(self) -> Ints:
        whole = self.slots[self.unit] * self._bytes
        return np.array(
            [each.memory_bytes or memory for each, memory in zip(self.replicas, whole, strict=True)], dtype=np.int64
        )

    def _relative(self, demand: Demand) -> Floats:
        """[D] rows per second, compared with most replicas, of slices that get what is usual; 1 where not measured."""
        busy = demand.high[demand.high > 0]
        rows = float(busy.mean()) if len(busy) else 1.0
        usual = _seconds(self.speed, rows)
        measured = [_measured(each) for each in self.replicas]
        relative = np.array([1.0 if speed is None else usual / _seconds(speed, rows) for speed in measured])
        bounded: Floats = np.clip(relative, 1 / _LIKE, _LIKE)
        return bounded

    @functools.cached_property
    def _resident(self) -> Copies:
        copies: list[tuple[int, int, int, float]] = []
        for device, each in enumerate(self.replicas):
            shares = {(copy.layer, copy.expert): copy.share for copy in self._planned.get(each.id, ())}
            for layer, expert in each.slices | shares.keys():
                row = self._grid.place.get(layer)
                known = row is not None and 0 <= expert < self._grid.unit.shape[1]
                if known and self._grid.unit[row, expert] == self.unit[device]:
                    copies.append((row or 0, expert, device, shares.get((layer, expert), 0.0)))
        return Copies.of(*zip(*copies, strict=True)) if copies else Copies.none()


def _measured(replica: ReplicaView) -> Speed | None:
    if replica.row_s is None:
        return None
    return Speed(replica.read_s or 0.0, replica.row_s)


def _common(replicas: Sequence[ReplicaView], declared: Speed) -> Speed:
    """The median of what was measured; `declared` where nothing was."""
    measured = [speed for speed in map(_measured, replicas) if speed is not None]
    if not measured:
        return declared
    return Speed(
        statistics.median(speed.read_s for speed in measured), statistics.median(speed.row_s for speed in measured)
    )


def _seconds(speed: Speed, rows: float) -> float:
    return max(speed.read_s, speed.row_s * rows, 1e-9)
