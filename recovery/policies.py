"""The policy that a service runs, as a process last saw it, never a wait."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable

import msgspec

from placement.policy import Policy, PolicyError
from placement.policy.bounds import Bounds, unit_bounds
from placement.policy.fitting import ModelFacts
from placement.policy.published import DOCUMENT, PublishedPolicy, decode, encode
from placement.unit import Unit
from recovery.directory import Directory
from recovery.lease import Watcher

log = logging.getLogger(__name__)


def read_policy(directory: Directory) -> PublishedPolicy | None:
    """What stands in the directory; None where nothing readable does. Raises Redis errors."""
    document = directory.read(DOCUMENT)
    try:
        return None if document is None else decode(document)
    except msgspec.DecodeError:
        return None


def start_policy(directory: Directory, policy: Policy, model: ModelFacts, *, keep: bool) -> None:
    """Publish what a service starts with. With `keep` only where there is none: one that was applied since stays."""
    before = None if keep else read_policy(directory)
    published = PublishedPolicy.of(policy, model, 1 if before is None else before.version + 1, time.time())
    directory.publish(DOCUMENT, encode(published), only_first=keep)


class PolicyReader:
    """Keeps `policy` (None before the first) and its `version` up to date in the background.

    `changed(policy)` is called there, with the first one too. Through a Redis that is down the last one stays, as it
    does where a newer one can't be read.
    """

    def __init__(self, directory: Directory, changed: Callable[[Policy], None] = lambda policy: None) -> None:
        self.version = 0
        self._current: tuple[Policy, dict[str, Bounds]] | None = None
        self._directory = directory
        self._changed = changed
        self._document: bytes | None = None
        self._watcher = Watcher(directory, self._refresh)
        self._watcher.__enter__()

    @property
    def policy(self) -> Policy | None:
        """The newest policy."""
        return None if self._current is None else self._current[0]

    def bounds(self, unit: Unit) -> Bounds | None:
        """How few and how many replicas `unit` may have; None before there is a policy."""
        if self._current is None:
            return None
        policy, known = self._current
        if unit.name not in known:
            known[unit.name] = unit_bounds(policy, unit)
        return known[unit.name]

    def __enter__(self) -> PolicyReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading."""
        self._watcher.close()

    def _refresh(self) -> None:
        document = self._directory.read(DOCUMENT)
        if document is None or document == self._document:
            return
        self._document = document
        try:
            published = decode(document)
            policy = published.read()
        except (msgspec.DecodeError, PolicyError) as error:
            log.warning("an unreadable policy is ignored, the last one stays: %s", error)
            return
        self._current = policy, {}
        self._changed(policy)
        self.version = published.version


@functools.cache
def policy_reader(redis_url: str, namespace: str) -> PolicyReader:
    """This process's reader for an application; it lives as long as the process does."""
    return PolicyReader(Directory(redis_url, namespace))
