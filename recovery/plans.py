"""The plan as a process last saw it: one background reader per application, never a wait."""

from __future__ import annotations

import functools
import logging

import msgspec

from placement import plan
from placement.plan import Plan
from recovery.directory import Directory
from recovery.lease import Watcher

log = logging.getLogger(__name__)


class PlanReader:
    """Keeps `plan` (None before the first) up to date; through a Redis that is down it keeps the last."""

    def __init__(self, directory: Directory) -> None:
        self.plan: Plan | None = None
        self._directory = directory
        self._watcher = Watcher(directory, self._refresh)
        self._watcher.__enter__()

    def _refresh(self) -> None:
        document = self._directory.read(plan.DOCUMENT)
        try:
            self.plan = plan.decode(document) if document is not None else self.plan
        except msgspec.DecodeError as error:
            log.warning("an unreadable plan is ignored, the last one stays: %s", error)

    def close(self) -> None:
        """Stop reading."""
        self._watcher.close()


@functools.cache
def plan_reader(redis_url: str, namespace: str) -> PlanReader:
    """This process's reader for an application; it lives as long as the process does."""
    return PlanReader(Directory(redis_url, namespace))
