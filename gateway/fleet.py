"""The replicas this gateway can reach: follows the directory, keeps a channel to each, publishes the dispatch table.

Connecting happens in the background; the engine's thread only ever reads the finished table.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from experts.wire.channel import Channel
from experts.wire.sockets import host_id
from recovery.directory import Directory, ReplicaEntry
from recovery.lease import Watcher

log = logging.getLogger(__name__)

_CONNECT_S = 5.0
_LATENCY_DECAY = 0.2
_DEADLINE_FACTOR = 20.0
_DEADLINE_FLOOR_S = 0.5


@dataclasses.dataclass(eq=False)
class Link:
    """A replica and the channel to it. `latency` is the running mean of its calls in seconds."""

    entry: ReplicaEntry
    channel: Channel
    latency: float | None = None

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
    """Immutable: links by id, and for each slice (layer, expert) the links that serve it."""

    links: Mapping[str, Link]
    slices: Mapping[tuple[int, int], tuple[Link, ...]]

    @classmethod
    def of(cls, links: Mapping[str, Link]) -> DispatchTable:
        """The table of these links."""
        slices: dict[tuple[int, int], list[Link]] = {}
        for _, link in sorted(links.items()):
            for expert in link.entry.experts:
                for layer in link.entry.layers:
                    slices.setdefault((layer, expert), []).append(link)
        return cls(dict(links), {key: tuple(value) for key, value in slices.items()})

    def copies(self, layer: int, expert: int) -> tuple[Link, ...]:
        """The links that serve a slice; none: it runs inline."""
        return self.slices.get((layer, expert), ())


class Fleet:
    """Keeps `table` true to the directory until closed. `changed(table)` is called in the background."""

    def __init__(
        self,
        directory: Directory,
        secret: bytes,
        fingerprint: str,
        changed: Callable[[DispatchTable], None] = lambda table: None,
    ) -> None:
        self.table = DispatchTable({}, {})
        self._directory = directory
        self._secret = secret
        self._fingerprint = fingerprint
        self._changed = changed
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
        self._update(lambda links: links.pop(link.entry.id, None) if links.get(link.entry.id) is link else None)

    def wait(self, timeout_s: float) -> None:
        """Return when the table has changed, or after `timeout_s`."""
        with self._lock:
            self._lock.wait(timeout_s)

    def _refresh(self) -> None:
        listed = {entry.id: entry for entry in self._directory.replicas()}
        if self.table.links.keys() - listed.keys():
            self._update(lambda links: [links.pop(name) for name in links.keys() - listed.keys()])
        with self._lock:
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
            self._update(lambda links: links.update({entry.id: Link(entry, channel)}))
        finally:
            with self._lock:
                self._connecting.discard(entry.id)

    def _address(self, entry: ReplicaEntry) -> str:
        near = entry.host == self._host
        for address in entry.addresses:
            if address.startswith("unix:") == near:
                return address
        raise OSError(f"no address of {entry.addresses} can be reached from this host")

    def _update(self, change: Callable[[dict[str, Link]], object]) -> None:
        with self._lock:
            links = dict(self.table.links)
            change(links)
            self.table = DispatchTable.of(links)
            self._changed(self.table)
            self._lock.notify_all()
