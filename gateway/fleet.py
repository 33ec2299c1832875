"""The replicas this gateway can reach: follows directory and plan, keeps a channel to each, publishes the table.

Connecting happens in the background; the engine's thread only ever reads the finished table. A link that left it is
closed by whoever lets go of it last: the engine's thread, when a call of its own is under way.
"""

from __future__ import annotations

import logging
import statistics
import threading
from concurrent.futures import ThreadPoolExecutor

from experts.wire.channel import Channel
from experts.wire.sockets import host_id
from gateway.table import DispatchTable, Link
from placement.cost import Speed
from recovery.directory import Directory, ReplicaEntry
from recovery.lease import Watcher
from recovery.plans import LatestPlan

log = logging.getLogger(__name__)

_CONNECT_S = 5.0


class Fleet:
    """Keeps `table` true to directory and plan until closed."""

    def __init__(self, directory: Directory, secret: bytes, fingerprint: str) -> None:
        self.table = DispatchTable({}, {})
        self._directory = directory
        self._secret = secret
        self._fingerprint = fingerprint
        self._plans = LatestPlan(directory)
        self._listed: dict[str, ReplicaEntry] = {}
        self._host = host_id()
        self._lock = threading.Condition()
        self._connecting: set[str] = set()
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="expert-connect")
        self._watcher = Watcher(directory, self._refresh)

    def __enter__(self) -> Fleet:
        self._watcher.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._watcher.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        for link in self.table.links.values():
            link.channel.close()
        self.table = DispatchTable({}, {})

    def drop(self, link: Link, reason: str) -> None:
        """Forget a replica that failed; it is tried again while the directory lists it."""
        log.warning("replica %s of %s is lost (%s): its rows run elsewhere", link.entry.id, link.entry.unit, reason)
        link.channel.close()
        with self._lock:
            if self.table.links.get(link.entry.id) is link:
                self._publish({name: each for name, each in self.table.links.items() if each is not link})

    def wait(self, timeout_s: float) -> None:
        """Return when the table has changed, or after `timeout_s`."""
        with self._lock:
            self._lock.wait(timeout_s)

    def speed(self) -> Speed | None:
        """That of an ordinary replica, as they say themselves; None while none does."""
        known = [(e.read_s, e.row_s) for e in self._listed.values() if e.read_s is not None and e.row_s is not None]
        if not known:
            return None
        reads, rows = zip(*known, strict=True)
        return Speed(statistics.median(reads), statistics.median(rows))

    def _refresh(self) -> None:
        stale = self._plans.refresh()
        listed = {entry.id: entry for entry in self._directory.replicas() if not entry.draining}
        with self._lock:
            self._listed = listed
            links = {name: link for name, link in self.table.links.items() if name in listed}
            stale |= len(links) < len(self.table.links)
            for name, link in links.items():
                stale |= link.entry.slices != listed[name].slices
                link.entry = listed[name]
            if stale:
                self._publish(links)
            new = [e for e in listed.values() if e.id not in self.table.links and e.id not in self._connecting]
            self._connecting.update(entry.id for entry in new)
        for entry in new:
            self._pool.submit(self._connect, entry)

    def _connect(self, entry: ReplicaEntry) -> None:
        try:
            channel = Channel.connect(self._address(entry), self._secret, self._fingerprint, _CONNECT_S)
        except OSError as error:
            log.info("replica %s of %s can't be reached: %s", entry.id, entry.unit, error)
        else:
            self._add(entry.id, channel)
        finally:
            with self._lock:
                self._connecting.discard(entry.id)

    def _add(self, name: str, channel: Channel) -> None:
        with self._lock:
            entry = self._listed.get(name)  # it may have changed meanwhile, or be gone
            if entry is None:
                channel.close()
            else:
                self._publish({**self.table.links, name: Link(entry, channel)})

    def _address(self, entry: ReplicaEntry) -> str:
        near = entry.host == self._host
        for address in entry.addresses:
            if address.startswith("unix:") == near:
                return address
        raise OSError(f"no address of {entry.addresses} can be reached from this host")

    def _publish(self, links: dict[str, Link]) -> None:
        """With the lock held: swap the table."""
        self.table = DispatchTable.of(links, self._plans.plan)
        self._lock.notify_all()
