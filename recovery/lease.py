"""Threads that keep an entry in the directory alive and that follow what others have there.

Both go on through a Redis that is down: the lease is written again when Redis is back, and a reader keeps what it
knew last.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

import redis

from recovery.directory import LEASE_S, Directory, GatewayEntry, ReplicaEntry

log = logging.getLogger(__name__)

E = TypeVar("E", ReplicaEntry, GatewayEntry)

_RENEW_S = LEASE_S / 5
_RETRY_S = 0.5
_STOP_CHECK_S = 0.1


class _Background:
    """A daemon thread that runs `_work` until `close`; Redis errors are logged once and tried again."""

    def __init__(self, name: str) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=name)

    def _work(self) -> None:
        """Work until `_stop` is set; may raise Redis errors."""
        raise NotImplementedError

    def _run(self) -> None:
        healthy = True
        while not self._stop.is_set():
            try:
                self._work()
                healthy = True
            except (redis.RedisError, OSError) as error:
                if healthy:
                    log.warning("Redis is lost, going on with what is known: %s", error)
                healthy = False
                self._stop.wait(_RETRY_S)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()


class Lease(_Background, Generic[E]):
    """Keeps an entry in the directory until closed, then gives it back. Raises Redis errors only when entered.

    `figures(entry)` is asked before each renewal, in the lease's thread, for what has changed and need not be known at
    once; `announce` is for what must be.
    """

    def __init__(self, directory: Directory, entry: E, figures: Callable[[E], E] | None = None) -> None:
        super().__init__("lease")
        self._directory = directory
        self._entry: E = entry
        self._figures: Callable[[E], E] = figures or (lambda entry: entry)
        self._changing = threading.Lock()
        self._wake = threading.Event()

    @property
    def entry(self) -> E:
        """What stands in the directory, or is about to."""
        return self._entry

    def __enter__(self) -> Lease[E]:
        self._directory.put(self._entry)
        self._thread.start()
        return self

    def announce(self, change: Callable[[E], E]) -> None:
        """Change the entry and tell all readers; where Redis is down, as soon as it is back."""
        with self._changing:
            self._entry = change(self._entry)
        self._wake.set()

    def _work(self) -> None:
        while not self._stop.is_set():
            changed = self._wake.wait(_RENEW_S)
            if self._stop.is_set():
                return
            self._wake.clear()
            with self._changing:
                self._entry = self._figures(self._entry)
            try:
                self._directory.put(self._entry, announce=changed, renewed=True)
            except (redis.RedisError, OSError):
                if changed:
                    self._wake.set()
                raise

    def close(self) -> None:
        """Give the lease back; where Redis is down it runs out by itself."""
        self._stop.set()
        self._wake.set()
        super().close()
        try:
            self._directory.remove(self._entry)
        except (redis.RedisError, OSError) as error:
            log.info("the lease of %s runs out by itself: %s", self._entry.id, error)


class Watcher(_Background):
    """Calls ``refresh()`` at once, at every change in the directory, and at least every `period` seconds.

    `refresh` reads from the directory; it runs in the watcher's thread and may raise Redis errors.
    """

    def __init__(self, directory: Directory, refresh: Callable[[], None], period: float = 1.0) -> None:
        super().__init__("directory-watcher")
        self._directory = directory
        self._refresh = refresh
        self._period = period

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def _work(self) -> None:
        with self._directory.changes() as wait:
            while not self._stop.is_set():
                self._refresh()
                due = time.monotonic() + self._period
                while not (wait(_STOP_CHECK_S) or self._stop.is_set() or time.monotonic() >= due):
                    pass
                while wait(0.0):  # changes that came together are read together
                    pass
