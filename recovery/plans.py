"""The plan as a process last saw it, never a wait."""

from __future__ import annotations

import functools
import logging

import msgspec

from placement import plan
from placement.plan import Plan
from recovery.directory import Directory
from recovery.lease import Watcher

log = logging.getLogger(__name__)


class LatestPlan:
    """The newest plan that was read: `plan`, None before the first. Older and unreadable ones are ignored."""

    def __init__(self, directory: Directory) -> None:
        self.plan: Plan | None = None
        self._directory = directory
        self._document: bytes | None = None

    def refresh(self) -> bool:
        """Read the directory; whether there is another plan now. Raises Redis errors."""
        document = self._directory.read(plan.DOCUMENT)
        if document is None or document == self._document:
            return False
        self._document = document
        try:
            found = plan.decode(document)
        except msgspec.DecodeError as error:
            log.warning("an unreadable plan is ignored, the last one stays: %s", error)
            return False
        if self.plan is not None and found.epoch < self.plan.epoch:
            log.warning("plan %d is ignored: plan %d is there already", found.epoch, self.plan.epoch)
            return False
        self.plan = found
        return True


class PlanReader:
    """Keeps `plan` (None before the first) up to date in the background; through a Redis that is down it stays."""

    def __init__(self, directory: Directory) -> None:
        self._latest = LatestPlan(directory)
        self._watcher = Watcher(directory, self._refresh)
        self._watcher.__enter__()

    @property
    def plan(self) -> Plan | None:
        """The newest plan."""
        return self._latest.plan

    def _refresh(self) -> None:
        self._latest.refresh()

    def close(self) -> None:
        """Stop reading."""
        self._watcher.close()


@functools.cache
def plan_reader(redis_url: str, namespace: str) -> PlanReader:
    """This process's reader for an application; it lives as long as the process does."""
    return PlanReader(Directory(redis_url, namespace))
