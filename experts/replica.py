"""A replica of an expert unit: a warm process that holds the slices the plan gives it and answers on the wire.

Knows nothing of Serve.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from experts import kernels
from experts.device import RealDevice, make_device
from experts.ffn import ExpertFFN
from experts.residency import Residency, wanted
from experts.store import ExpertStore
from experts.wire.frame import Segment
from experts.wire.server import ExpertServer, NotServedError, Shortcut
from experts.wire.sockets import host_id
from placement.cost import Speed, SpeedFit
from placement.policy import ExpertPolicy
from placement.unit import Unit
from recovery.directory import START_S, Directory, ReplicaEntry
from recovery.lease import Lease, Watcher
from recovery.plans import LatestPlan

_HANG_UP_S = 2.0
"""What gateways have to hang up once a replica is told to go; Serve allows 5 s."""


class Replica:
    """Holds slices of `unit`, listens on this host and on TCP at `node_ip`, and keeps a lease in the directory.

    Rows of slices that it does not hold at the moment are computed all the same.
    Raise StoreError for a store that can't be mapped, DirectoryError where Redis stays silent. Close it when done.
    """

    def __init__(
        self,
        unit: Unit,
        store: Path,
        policy: ExpertPolicy,
        directory: Directory,
        *,
        name: str,
        node: str,
        node_ip: str,
        compiled: Path | None = None,
    ) -> None:
        """`compiled` is the folder of this host where compiled kernels are, or will be."""
        self._unit = unit
        self._slices = [(layer, expert) for expert in unit.experts for layer in unit.layers]
        self._mine = frozenset(self._slices)
        self._name = name
        opened = ExpertStore.open(store)
        device = "cuda" if policy.resources.gpu else "cpu"
        manifest = opened.manifest
        memory_bytes = int((policy.memory_mib or 0) * (1 << 20))
        self._fit = SpeedFit(Speed.of(manifest.slice_bytes, manifest.slice_numbers))
        self._lock = threading.Lock()
        self._busy_s, self._calls, self._rows, self._misses = 0.0, 0, 0, 0
        self._exits = contextlib.ExitStack()
        if compiled is not None:
            self._exits.enter_context(kernels.loading(compiled, policy.threads))
        self._ffn = ExpertFFN(opened, device=device, fast=True)
        directory.wait(START_S)
        self._device = make_device(policy.device, device, directory.number(unit.name))
        self._plans = LatestPlan(directory)
        self._residency = Residency(self._ffn, manifest.slice_bytes, memory_bytes, self._announce)
        self._lease: Lease[ReplicaEntry] | None = None
        self._follow()
        self._exits.enter_context(self._residency)
        self._server = self._exits.enter_context(
            ExpertServer(
                self.compute, directory.secret(), manifest.fingerprint, node_ip, policy.threads, self._shortcut()
            )
        )
        entry = ReplicaEntry(
            id=name,
            unit=unit.name,
            pid=os.getpid(),
            node=node,
            host=host_id(),
            addresses=self._server.addresses,
            experts=list(unit.experts),
            layers=list(unit.layers),
            fingerprint=manifest.fingerprint,
            slices=self._residency.slices,
            device=self._device.name,
            memory_bytes=memory_bytes,
            started_at=time.time(),
        )
        self._lease = self._exits.enter_context(Lease(directory, self._figures(entry), self._figures))
        self._announce(self._residency.slices)  # some may have come since the entry was written
        self._exits.enter_context(Watcher(directory, self._follow))

    @property
    def listening(self) -> bool:
        """Whether gateways can still connect."""
        return self._server.listening

    def compute(self, layer: int, segments: Sequence[Segment], rows: torch.Tensor, out: torch.Tensor) -> None:
        """Run ``rows [N, H]``, sorted by segment, into `out`; raise NotServedError for slices of other units."""
        loaded = self._ffn.loaded
        for expert, _ in segments:
            if (layer, expert) not in self._mine:
                raise NotServedError(f"expert {expert} of layer {layer} is not served by {self._unit.name}")
        misses = sum((layer, expert) not in loaded for expert, _ in segments)
        counts = [count for _, count in segments]
        spent = self._device.run(counts, lambda: self._ffn.compute(layer, segments, rows, out))
        if not misses:
            self._fit.observe(counts, spent)
        with self._lock:
            self._busy_s += spent
            self._calls += 1
            self._rows += len(rows)
            self._misses += misses

    def _shortcut(self) -> Shortcut | None:
        """Calls are answered without Python, unless the device is only emulated."""
        return self._ffn.serve if isinstance(self._device, RealDevice) else None

    def close(self) -> None:
        """Tell gateways to go, answer until they have, then give the lease back and hang up."""
        if self._lease is not None:
            self._lease.announce(lambda entry: msgspec.structs.replace(entry, draining=True))
            self._server.drain(_HANG_UP_S)
        self._exits.close()

    def _follow(self) -> None:
        if self._plans.refresh() or self._lease is None:
            self._residency.want(wanted(self._plans.plan, self._name, self._slices))

    def _announce(self, slices: list[tuple[int, int]]) -> None:
        if self._lease is not None:
            self._lease.announce(
                lambda entry: msgspec.structs.replace(entry, slices=slices, resident_bytes=self._ffn.resident_bytes)
            )

    def _figures(self, entry: ReplicaEntry) -> ReplicaEntry:
        for call in self._ffn.tally.latest():
            self._fit.observe([-(-call.rows // call.segments)] * call.segments, call.seconds)
        busy_s, calls, rows = self._ffn.tally.totals()
        speed = self._fit.speed
        with self._lock:
            return msgspec.structs.replace(
                entry,
                resident_bytes=self._ffn.resident_bytes,
                read_s=None if speed is None else speed.read_s,
                row_s=None if speed is None else speed.row_s,
                busy_s=self._busy_s + busy_s,
                calls=self._calls + calls,
                rows=self._rows + rows,
                misses=self._misses,
            )
