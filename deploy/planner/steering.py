"""From the expected load to the published plan: looks who is there, asks `placement.round`, and says what changed."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass

import msgspec
import numpy as np
from msgspec import structs

from deploy.planner.loads import ExpectedLoad
from placement import plan
from placement.cost import Speed
from placement.plan import Plan
from placement.problem import ProblemError
from placement.round import Round
from placement.settings import RoundSettings
from placement.unit import Unit
from placement.views import LoadView, ReplicaView
from recovery.directory import Directory, GatewayEntry, ReplicaEntry
from recovery.lease import Watcher

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelSlices:
    """What a plan cuts up and hands out."""

    units: tuple[Unit, ...]
    layers: tuple[int, ...]
    """Numbers of its MoE layers."""
    experts: int
    slice_bytes: int
    speed: Speed
    """What a gateway takes for a slice's rows, until gateways have measured it."""


class Steering:
    """Publishes plans for one application until closed. `steer` may raise Redis errors."""

    def __init__(self, directory: Directory, model: ModelSlices, settings: RoundSettings, horizon_s: float) -> None:
        self._directory = directory
        self._model = model
        self._settings = settings
        self._horizon_s = horizon_s
        self._started = time.monotonic()
        self._round: Round | None = None
        self._published: Plan | None = None
        self._decided: Plan | None = None
        self._epoch = 0
        self._members: frozenset[tuple[str, bool]] = frozenset()
        self._changed = threading.Event()
        self._watcher = Watcher(directory, self._look)
        self._watcher.__enter__()

    @property
    def due(self) -> bool:
        """Whether replicas came or went since the last plan."""
        return self._changed.is_set()

    def close(self) -> None:
        """Stop looking; the last plan stays."""
        self._watcher.close()

    def forget(self) -> None:
        """Go on from the plan that stands in the directory by then: others have planned meanwhile."""
        self._round = None

    def use(self, settings: RoundSettings, horizon_s: float) -> None:
        """Plan by these from now on; `horizon_s` is that of the loads."""
        self._settings, self._horizon_s = settings, horizon_s
        if self._round is not None:
            self._round.use(settings)

    def steer(self, load: ExpectedLoad | None) -> Plan | None:
        """The plan for `load` (None: nothing was heard yet) and the replicas there are, published where it is new.

        None before the first plan, which gateways publish once they serve.
        """
        self._changed.clear()
        if self._round is None and not self._begin():
            return None
        assert self._round is not None
        gateways = self._directory.gateways()
        hosts = {gateway.host for gateway in gateways}
        replicas = [_view(entry, hosts) for entry in self._directory.replicas()]
        try:
            decided = self._round.decide(
                self._view(load or self._no_load()), replicas, _inline_speed(gateways, self._model.speed)
            )
        except ProblemError as error:
            log.warning("no new plan, the last one stays: %s", error)
            return self._published
        if decided is not self._decided or self._directory.read(plan.DOCUMENT) is None:
            now = time.time()
            self._epoch = max(self._epoch + 1, int(now))  # grows also where Redis and planner lost their memory
            self._published = structs.replace(decided, epoch=self._epoch, made_at=now)
            self._directory.publish(plan.DOCUMENT, plan.encode(self._published))
            log.info("plan %d: %s", self._epoch, decided.reason)
            self._decided = decided
        return self._published

    def _begin(self) -> bool:
        document = self._directory.read(plan.DOCUMENT)
        if document is None:
            return False
        try:
            self._published = self._decided = plan.decode(document)
            self._epoch = self._published.epoch
        except msgspec.DecodeError as error:
            log.warning("an unreadable plan is replaced: %s", error)
        model = self._model
        self._round = Round(
            model.units, model.layers, model.experts, model.slice_bytes, self._settings, last=self._published
        )
        return True

    def _view(self, load: ExpectedLoad) -> LoadView:
        return LoadView(
            now_s=time.monotonic(),
            rows=load.rows,
            p90=load.p90,
            horizon_s=self._horizon_s,
            steps_per_s=load.steps_per_s,
            idle_s=load.idle_s,
        )

    def _no_load(self) -> ExpectedLoad:
        nothing = np.zeros((len(self._model.layers), self._model.experts))
        return ExpectedLoad(nothing, nothing, 0.0, nothing + time.monotonic() - self._started)

    def _look(self) -> None:
        members = frozenset((entry.id, entry.draining) for entry in self._directory.replicas())
        if members != self._members:
            self._members = members
            self._changed.set()


def _view(entry: ReplicaEntry, gateway_hosts: set[str]) -> ReplicaView:
    return ReplicaView(
        id=entry.id,
        unit=entry.unit,
        node=entry.node,
        host=entry.host,
        slices=frozenset(entry.slices),
        memory_bytes=entry.memory_bytes,
        read_s=entry.read_s,
        row_s=entry.row_s,
        near=entry.host in gateway_hosts,
        draining=entry.draining,
        started_at=entry.started_at,
    )


def _inline_speed(gateways: list[GatewayEntry], default: Speed) -> Speed:
    """The median of what gateways measured."""
    read = [g.inline_read_s for g in gateways if g.inline_read_s is not None and g.inline_row_s is not None]
    row = [g.inline_row_s for g in gateways if g.inline_read_s is not None and g.inline_row_s is not None]
    return Speed(float(np.median(read)), float(np.median(row))) if read else default
