"""The dispatch table: which replicas get a slice's rows, as plan and directory together say. Immutable."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from experts.wire.channel import Channel
from gateway.assignment import Holders
from gateway.levelling import Pace
from placement.plan import Copy, Plan
from recovery.directory import ReplicaEntry

_LATENCY_DECAY = 0.2
_DEADLINE_FACTOR = 20.0
_DEADLINE_FLOOR_S = 0.5

Slice = tuple[int, int]
"""(layer, expert)"""


@dataclasses.dataclass(eq=False)
class Link:
    """A replica and the channel to it. `latency` is the running mean of its calls in seconds."""

    entry: ReplicaEntry
    """As the directory said last."""
    channel: Channel
    latency: float | None = None

    def pace(self, min_rows: int) -> Pace:
        """As measured; before that a slice's weights are read in the time of `min_rows` rows."""
        entry = self.entry
        if entry.read_s is None or not entry.row_s:
            return Pace(float(min_rows), 1.0)
        return Pace(entry.read_s, entry.row_s)

    def observe(self, seconds: float) -> None:
        """Take one call's duration into the running mean."""
        before = seconds if self.latency is None else self.latency
        self.latency = before + _LATENCY_DECAY * (seconds - before)

    def deadline(self, limit: float) -> float:
        """Seconds after which a call counts as lost: a multiple of this replica's own latency, at most `limit`."""
        if self.latency is None:
            return limit
        return min(limit, max(_DEADLINE_FLOOR_S, _DEADLINE_FACTOR * self.latency))


@dataclasses.dataclass(frozen=True)
class DispatchTable:
    """Links by id, and for each slice the links that get its rows, with their shares."""

    links: Mapping[str, Link]
    slices: Mapping[Slice, Holders[Link]]
    epoch: int = 0
    """That of the plan it follows; 0: none."""
    levelled: bool = False
    """Whether steps are levelled (see `Plan.levelled`), and any slice has a choice of links."""

    @classmethod
    def of(cls, links: Mapping[str, Link], plan: Plan | None = None) -> DispatchTable:
        """The table of these links under a plan."""
        resident: dict[Slice, list[Link]] = {}
        for _, link in sorted(links.items()):
            for slice_ in link.entry.slices:
                resident.setdefault(slice_, []).append(link)
        epoch = 0 if plan is None else plan.epoch
        if plan is None or plan.copies is None:
            return cls(dict(links), {slice_: Holders.evenly(held) for slice_, held in resident.items()}, epoch)
        slices = _planned(resident, plan.copies)
        choice = any(len(holders.replicas) > 1 for holders in slices.values())
        return cls(dict(links), slices, epoch, plan.levelled and choice)

    def holders(self, layer: int, expert: int) -> Holders[Link]:
        """The links that get rows of a slice; none: it runs inline."""
        return self.slices.get((layer, expert), _NOBODY)


_NOBODY: Holders[Link] = Holders.of([])


def _planned(
    resident: Mapping[Slice, Collection[Link]], copies: Mapping[str, Collection[Copy]]
) -> dict[Slice, Holders[Link]]:
    """By share; where nobody with a share holds the slice those in reserve, and until these do whoever held it before.

    A slice the plan gives to nobody runs inline.
    """
    shares: dict[Slice, dict[str, float]] = {}
    for replica, held in copies.items():
        for copy in held:
            shares.setdefault((copy.layer, copy.expert), {})[replica] = copy.share
    slices = {}
    for slice_, planned in shares.items():
        holders = resident.get(slice_, ())
        active = [(link, share) for link in holders if (share := planned.get(link.entry.id, 0.0)) > 0]
        if active:
            slices[slice_] = Holders.of(active)
        elif holders:
            slices[slice_] = Holders.evenly([link for link in holders if link.entry.id in planned] or holders)
    return slices
