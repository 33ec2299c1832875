"""A replica of an expert unit: a warm process that maps its slices and answers on the wire. Knows nothing of Serve."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from experts import kernels
from experts.ffn import ExpertFFN
from experts.store import ExpertStore
from experts.wire.frame import Segment
from experts.wire.server import ExpertServer, NotServedError
from experts.wire.sockets import host_id
from placement.policy import ExpertPolicy
from placement.unit import Unit
from recovery.directory import START_S, Directory, ReplicaEntry
from recovery.lease import Lease


class Replica:
    """Maps the slices of `unit`, listens on this host and on TCP at `node_ip`, and keeps a lease in the directory.

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
        self._slices = frozenset((layer, expert) for layer in unit.layers for expert in unit.experts)
        opened = ExpertStore.open(store)
        self._exits = contextlib.ExitStack()
        if compiled is not None:
            self._exits.enter_context(kernels.loading(compiled, policy.threads))
        self._ffn = ExpertFFN(opened, device="cuda" if policy.resources.gpu else "cpu", fast=True)
        for expert in unit.experts:
            self._ffn.load(expert)
        directory.wait(START_S)
        self._server = self._exits.enter_context(
            ExpertServer(
                self.compute, directory.secret(), opened.manifest.fingerprint, node_ip, policy.threads, self._serve
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
            fingerprint=opened.manifest.fingerprint,
        )
        self._exits.enter_context(Lease(directory, entry))

    @property
    def listening(self) -> bool:
        """Whether gateways can still connect."""
        return self._server.listening

    def compute(self, layer: int, segments: Sequence[Segment], rows: torch.Tensor, out: torch.Tensor) -> None:
        """Run ``rows [N, H]``, sorted by segment, into `out`; raise NotServedError for slices of other units."""
        for expert, _ in segments:
            if (layer, expert) not in self._slices:
                raise NotServedError(f"expert {expert} of layer {layer} is not served by {self._unit.name}")
        self._ffn.compute(layer, segments, rows, out)

    def _serve(self, descriptor: int, arena: int, memory: torch.Tensor) -> None:
        """Answer calls on a descriptor without Python, as long as they are of this unit's slices."""
        self._ffn.serve(descriptor, arena, memory, self._slices)

    def close(self) -> None:
        """Give the lease back, so that no gateway sends new rows, then hang up."""
        self._exits.close()
