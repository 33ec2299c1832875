"""Requests under way, kept in Redis so that they outlive the api process that answers them.

A request is kept under a place of its client's choosing: what was asked, as bytes, and the tokens so far. Writing is
done beside the answers, ten times a second and all together; nobody waits for it, and a Redis that is away costs
nothing but the ability to go on. Everything expires by itself.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import redis.asyncio
from redis.exceptions import RedisError

log = logging.getLogger(__name__)

KEPT_S = 300
"""What is kept of a request, after its last token."""
_FLUSH_S = 0.1
_ANSWER_S = 0.5
"""Redis answers by then or does without."""
_PAUSE_S = 2.0
_MOST = 4096
"""Requests of one process that are kept at a time."""

# KEYS: request, tokens. ARGV: attempt. A later attempt of the same request stays.
_FORGET = """
redis.call('DEL', KEYS[2])
if redis.call('HGET', KEYS[1], 'attempt') == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


@dataclass(frozen=True)
class Kept:
    """A request that was under way."""

    asked: bytes
    tokens: list[int]
    attempt: str


@dataclass(eq=False)
class Entry:
    """A request that is being answered; `add` its tokens as they come."""

    place: str
    asked: bytes
    tokens: list[int]
    before: str | None = None
    """The attempt that this one goes on from; both are over with it."""
    attempt: str = field(default_factory=lambda: secrets.token_hex(8))
    written: int = -1
    """Tokens that Redis has; -1: it does not know the request."""
    ended: bool = False

    def add(self, tokens: Sequence[int]) -> None:
        """Tokens that its client is about to get."""
        self.tokens.extend(tokens)


class Journal:
    """One api process's journal in the Redis at `url`, under `namespace`. An async context manager."""

    def __init__(self, url: str, namespace: str) -> None:
        self._prefix = f"evermoe:{namespace}:journal:"
        self._redis = redis.asyncio.Redis.from_url(
            url, socket_connect_timeout=_ANSWER_S, socket_timeout=_ANSWER_S, retry_on_timeout=False
        )
        self._entries: set[Entry] = set()
        self._ending = asyncio.Event()
        self._away_until = 0.0
        self._healthy = True

    async def __aenter__(self) -> Journal:
        self._writing = asyncio.create_task(self._write(), name="journal")
        return self

    async def __aexit__(self, *error: object) -> None:
        self._ending.set()  # not cancelled: what it is writing would be left half written
        await self._writing
        await self._redis.aclose()

    async def find(self, place: str) -> Kept | None:
        """The request that was under way at `place`; None where there was none, or Redis is away."""
        if time.monotonic() < self._away_until:
            return None
        try:
            asked, attempt = cast(list[bytes | None], await self._redis.hmget(self._request(place), "asked", "attempt"))
            if asked is None or attempt is None:
                return None
            kept = cast(bytes | None, await self._redis.get(self._tokens(place, attempt.decode()))) or b""
        except (RedisError, OSError) as error:
            self._away(error)
            return None
        return Kept(asked, list(array.array("I", kept[: len(kept) // 4 * 4])), attempt.decode())

    @contextlib.contextmanager
    def entry(self, place: str, asked: bytes, tokens: Sequence[int] = (), before: str | None = None) -> Iterator[Entry]:
        """Keep a request while the context lasts; `tokens` are those it had already, from the attempt `before`."""
        entry = Entry(place, asked, list(tokens), before)
        if len(self._entries) < _MOST:
            self._entries.add(entry)
        try:
            yield entry
        finally:
            entry.ended = True

    async def _write(self) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ending.wait(), _FLUSH_S)
            await self._flush()

    async def _flush(self) -> None:
        """Write what is new, all in one go."""
        if time.monotonic() < self._away_until or not self._entries:
            return
        sizes = {entry: len(entry.tokens) for entry in self._entries}
        ended = [entry for entry in sizes if entry.ended]
        try:
            async with self._redis.pipeline(transaction=False) as pipe:
                for entry, size in sizes.items():
                    self._put(pipe, entry, size)
                answers = await pipe.execute() if len(pipe) else []
        except (RedisError, OSError) as error:
            self._away(error)
        else:
            self._healthy = True
            for entry, size in sizes.items():
                entry.written = size
            if any(
                answer is False for answer in answers
            ):  # there was nothing to renew: it has come back empty, before anybody noticed
                self._begin_anew()
        self._entries.difference_update(ended)

    def _begin_anew(self) -> None:
        for entry in self._entries:
            entry.written = -1

    def _put(self, pipe: Any, entry: Entry, size: int) -> None:
        """Add to `pipe` what Redis has to be told of `entry`; what it renews answers False where it is not there."""
        request, tokens = self._request(entry.place), self._tokens(entry.place, entry.attempt)
        if entry.ended:
            for attempt in (entry.before, entry.attempt if entry.written >= 0 else None):
                if attempt is not None:
                    pipe.eval(_FORGET, 2, request, self._tokens(entry.place, attempt), attempt)
            return
        if entry.written == size:
            return
        new = array.array("I", entry.tokens[max(entry.written, 0) : size]).tobytes()
        if entry.written < 0:
            pipe.hset(request, mapping={"asked": entry.asked, "attempt": entry.attempt})
            pipe.set(tokens, new)
        else:
            pipe.append(tokens, new)
        pipe.expire(request, KEPT_S)
        pipe.expire(tokens, KEPT_S)

    def _away(self, error: Exception) -> None:
        self._away_until = time.monotonic() + _PAUSE_S
        self._begin_anew()
        if self._healthy:
            self._healthy = False
            log.warning("Redis is away, running requests are not kept: %s", error)

    def _request(self, place: str) -> str:
        return f"{self._prefix}{place}"

    def _tokens(self, place: str, attempt: str) -> str:
        return f"{self._prefix}{place}:{attempt}"
