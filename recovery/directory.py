"""The directory in Redis: who is alive, where it listens, what it serves.

An entry is a lease: its owner renews it, and Redis itself forgets it when the owner is gone. Readers are told of
changes by a message and read again every now and then anyway: a lost message costs a moment, not correctness.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import msgspec
import redis

LEASE_S = 5.0
START_S = 30.0
"""How long a starting process waits for a Redis that starts beside it."""


class DirectoryError(ConnectionError):
    """Redis cannot be reached; the message names the URL and the remedy."""


class ReplicaEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A replica of an expert unit that is ready for calls."""

    id: str
    unit: str
    pid: int
    node: str
    host: str
    """`experts.wire.sockets.host_id` of the replica."""
    addresses: list[str]
    experts: list[int]
    layers: list[int]
    fingerprint: str
    slices: list[tuple[int, int]] = []
    """(layer, expert) that are resident and meant to be: rows of them are welcome."""
    draining: bool = False
    """Told to go: it answers what is under way and wants nothing more."""
    device: str = "cpu"
    """What computes, for people: ``cpu``, ``cuda:0``, ``emulated (2000 rows/s, 1.5 ms)``."""
    memory_bytes: int = 0
    """What its slices may take; 0: no bound."""
    resident_bytes: int = 0
    """What they take."""
    read_s: float | None = None
    """A slice's rows take ``max(read_s, row_s * rows)``, as its own calls have shown; None: too few of them yet."""
    row_s: float | None = None
    busy_s: float = 0.0
    """Time its device spent on calls since the start, their number and that of their rows."""
    calls: int = 0
    rows: int = 0
    misses: int = 0
    """Segments of slices that were not resident: they were computed all the same."""
    started_at: float = 0.0
    """Seconds since the epoch."""


class GatewayEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway that takes requests."""

    id: str
    pid: int
    node: str
    host: str
    addresses: list[str]
    fingerprint: str
    inline_read_s: float | None = None
    """A slice's rows that it computes itself take ``max(read_s, row_s * rows)``; None: none yet."""
    inline_row_s: float | None = None
    call_s: float | None = None
    """What a layer's calls to replicas take beyond their computing; None: none yet."""
    inline_rows: int = 0
    """Rows it computed itself since the start."""
    inline_bytes: int = 0
    """Expert weights that it holds itself."""


Entry = TypeVar("Entry", ReplicaEntry, GatewayEntry)


class Directory:
    """One application's part of a Redis server. Thread-safe; every method may raise `redis.RedisError`."""

    def __init__(self, url: str, namespace: str) -> None:
        self.url = url
        self.namespace = namespace
        self._prefix = f"evermoe:{namespace}:"
        self._known: dict[str, bytes] = {}
        """What a Redis that comes back empty has to be told again: the secret, and documents as they were last seen."""
        try:
            self._redis = redis.Redis.from_url(url, socket_connect_timeout=2.0, socket_timeout=5.0)
        except ValueError as error:
            raise DirectoryError(f"{url!r} is no Redis URL: give redis://HOST:PORT or unix:///PATH") from error

    def wait(self, patience_s: float = 0.0) -> None:
        """Return once Redis answers; raise DirectoryError where it does not within `patience_s` seconds."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                self._redis.ping()
            except (redis.RedisError, OSError) as error:
                if time.monotonic() >= deadline:
                    remedy = "start it, or unset REDIS_URL for the embedded one"
                    raise DirectoryError(f"Redis at {self.url} does not answer ({error}): {remedy}") from error
                time.sleep(0.01)
            else:
                return

    def secret(self) -> bytes:
        """The cluster secret of this application, drawn by whoever asks first."""
        self._redis.set(self._key("secret"), secrets.token_hex(32), nx=True)
        stored = self._redis.get(self._key("secret"))
        if not isinstance(stored, bytes):
            raise redis.RedisError("the cluster secret vanished while it was read")
        self._known["secret"] = stored
        return stored

    def put(self, entry: ReplicaEntry | GatewayEntry, *, announce: bool = False, renewed: bool = False) -> None:
        """Write or renew the lease of `entry`; readers are told where it is new, or to be announced.

        Where one that is `renewed` is new to Redis, Redis was emptied: it is told again what this process knows.
        """
        role = _role(type(entry))
        with self._redis.pipeline() as pipe:
            pipe.set(self._key(role, entry.id), msgspec.json.encode(entry), px=int(LEASE_S * 1000))
            pipe.sadd(self._key(role), entry.id)
            added = pipe.execute()[1]
        if added and renewed:
            self._restore()
        if added or announce:
            self._announce()

    def remove(self, entry: ReplicaEntry | GatewayEntry) -> None:
        """Give the lease of `entry` back."""
        role = _role(type(entry))
        with self._redis.pipeline() as pipe:
            pipe.delete(self._key(role, entry.id))
            pipe.srem(self._key(role), entry.id)
            pipe.execute()
        self._announce()

    def replicas(self) -> list[ReplicaEntry]:
        """All live expert replicas, by id."""
        return self._entries(ReplicaEntry)

    def gateways(self) -> list[GatewayEntry]:
        """All live gateways, by id."""
        return self._entries(GatewayEntry)

    def publish(self, document: str, value: bytes, *, only_first: bool = False) -> None:
        """Store a named document (the plan, say) and tell readers; `only_first` keeps one that is there."""
        if self._redis.set(self._key(document), value, nx=only_first):
            self._known[document] = value
            self._announce()
        else:
            self.read(document)

    def exchange(self, document: str, before: bytes | None, value: bytes) -> bool:
        """Store a named document where it is still as it was read `before`; whether it was."""
        key = self._key(document)
        with self._redis.pipeline() as pipe:
            try:
                pipe.watch(key)  # type: ignore[no-untyped-call]
                if pipe.get(key) != before:
                    return False
                pipe.multi()
                pipe.set(key, value)
                pipe.execute()
            except redis.WatchError:
                return False
        self._known[document] = value
        self._announce()
        return True

    def read(self, document: str) -> bytes | None:
        """The named document; None where there is none."""
        value = self._redis.get(self._key(document))
        if not isinstance(value, bytes):
            return None
        self._known[document] = value
        return value

    def number(self, series: str) -> int:
        """The next number of a named series, from 0 on."""
        return self._redis.incr(self._key("number", series)) - 1

    def append(self, stream: str, value: bytes, *, keep: int) -> None:
        """Add to a named stream, of which about the last `keep` values are kept."""
        self._redis.xadd(self._key(stream), {"value": value}, maxlen=keep, approximate=False)

    def entries(self, stream: str, after: str, wait_s: float, most: int = 64) -> list[tuple[str, bytes]]:
        """(place, value) of what comes in a stream behind the place `after`; none where nothing comes in `wait_s`.

        ``0`` is the place before the first value that is kept, ``$`` the one behind the last.
        """
        key = self._key(stream)
        found = cast(list[Any], self._redis.xread({key: after}, count=most, block=max(int(wait_s * 1000), 1)))
        return [(place.decode(), fields[b"value"]) for _, values in found for place, fields in values]

    @contextlib.contextmanager
    def changes(self) -> Iterator[Callable[[float], bool]]:
        """Yields a function that waits for the next change, at most so many seconds, and says whether there was one."""
        with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
            pubsub.subscribe(self._key("changes"))

            def wait(timeout: float) -> bool:
                return pubsub.get_message(timeout=timeout) is not None

            yield wait

    def _entries(self, kind: type[Entry]) -> list[Entry]:
        role = _role(kind)
        names = sorted(cast(set[bytes], self._redis.smembers(self._key(role))))
        if not names:
            return []
        values = self._redis.mget([f"{self._key(role)}:".encode() + name for name in names])
        expired = [name for name, value in zip(names, values, strict=True) if value is None]
        if expired:
            self._redis.srem(self._key(role), *expired)
        return [msgspec.json.decode(value, type=kind) for value in values if value is not None]

    def _restore(self) -> None:
        """Write what is missing. The secret is overwritten: whoever drew another one meanwhile has talked to nobody."""
        for name, value in self._known.items():
            self._redis.set(self._key(name), value, nx=name != "secret")

    def _announce(self) -> None:
        self._redis.publish(self._key("changes"), b"")

    def _key(self, *parts: str) -> str:
        return self._prefix + ":".join(parts)


def _role(kind: type) -> str:
    return "gateway" if kind is GatewayEntry else "replica"
