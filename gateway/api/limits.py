"""What a key may use, counted in Redis and so by all api processes together.

Requests and tokens per minute are token buckets that refill steadily and hold one minute's worth. Requests at a time
are leases, renewed while a request runs: those of an api process that died run out. A Redis that is away limits nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from gateway.api.errors import ApiError
from gateway.api.keys import Key
from gateway.api.request_record import RequestRecord

log = logging.getLogger(__name__)

_LEASE_S = 60.0
_ANSWER_S = 0.5
"""Redis answers by then or does without."""
_PAUSE_S = 2.0
"""Redis is left alone for so long after it failed, lest every request waits for it."""

_PRELUDE = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local function level(what, limit)
  local kept = redis.call('HMGET', KEYS[1], what, what .. '_at')
  if not kept[1] then return limit end
  return math.min(limit, kept[1] + math.max(now - kept[2], 0) * limit / 60)  -- clocks may be set back
end
local function keep(what, value, limit)
  redis.call('HSET', KEYS[1], what, tostring(value), what .. '_at', string.format('%.6f', now))
  local full = math.ceil((limit - value) * 60 / limit) + 60
  if redis.call('TTL', KEYS[1]) < full then redis.call('EXPIRE', KEYS[1], full) end
end
"""

# KEYS: buckets, leases. ARGV: request, lease (s), prompt tokens, and the three limits (0: none).
# Answers {refused: 0, or 1 at a time, 2 requests, 3 tokens; levels of both buckets; seconds to wait}.
_ADMIT = (
    _PRELUDE
    + """
local tokens, most, rpm, tpm = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local requests_left = rpm > 0 and level('requests', rpm) or 0
local tokens_left = tpm > 0 and level('tokens', tpm) or 0
local needed = math.min(tokens, tpm)
local refused, wait = 0, 0
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
if most > 0 and redis.call('ZCARD', KEYS[2]) >= most then
  refused, wait = 1, 1
elseif rpm > 0 and requests_left < 1 then
  refused, wait = 2, (1 - requests_left) * 60 / rpm
elseif tpm > 0 and tokens_left < needed then
  refused, wait = 3, (needed - tokens_left) * 60 / tpm
else
  if most > 0 then
    redis.call('ZADD', KEYS[2], now + ARGV[2], ARGV[1])
    redis.call('EXPIRE', KEYS[2], math.ceil(ARGV[2]))
  end
  if rpm > 0 then requests_left = requests_left - 1; keep('requests', requests_left, rpm) end
  if tpm > 0 then tokens_left = tokens_left - tokens; keep('tokens', tokens_left, tpm) end
end
return {refused, tostring(requests_left), tostring(tokens_left), tostring(wait)}
"""
)

# KEYS: buckets, leases. ARGV: request, generated tokens, tokens per minute (0: no limit).
_SETTLE = (
    _PRELUDE
    + """
redis.call('ZREM', KEYS[2], ARGV[1])
local limit = tonumber(ARGV[3])
if limit > 0 then keep('tokens', level('tokens', limit) - ARGV[2], limit) end
"""
)

# KEYS: leases. ARGV: lease (s), request. It is added where it is missing: Redis may have come back empty.
_RENEW = """
local clock = redis.call('TIME')
redis.call('ZADD', KEYS[1], clock[1] + ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], math.ceil(ARGV[1]))
"""

_REFUSALS = {1: ("requests at a time", "max_concurrent"), 2: ("requests per minute", "requests_per_minute"),
             3: ("tokens per minute", "tokens_per_minute")}  # fmt: skip


class Limits:
    """Keeps the limits of keys in the Redis at `url`, under `namespace`. An async context manager."""

    def __init__(self, url: str, namespace: str) -> None:
        self._prefix = f"evermoe:{namespace}:quota:"
        self._redis = redis.asyncio.Redis.from_url(
            url, socket_connect_timeout=_ANSWER_S, socket_timeout=_ANSWER_S, retry_on_timeout=False
        )
        self._admit, self._settle, self._renew = map(self._redis.register_script, (_ADMIT, _SETTLE, _RENEW))
        self._running: dict[str, Key] = {}
        self._away_until = 0.0
        self._healthy = True

    async def __aenter__(self) -> Limits:
        self._renewing = asyncio.create_task(self._keep_leases(), name="quota-leases")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._renewing.cancel()
        await asyncio.gather(self._renewing, return_exceptions=True)
        await self._redis.aclose()

    @contextlib.asynccontextmanager
    async def admitted(self, key: Key, record: RequestRecord) -> AsyncIterator[None]:
        """The context of a request that `key` may make; raise a 429 where it may not now.

        Gives the record OpenAI's ``x-ratelimit-*`` headers; charges its prompt now and its answer at the end.
        """
        place = uuid.uuid4().hex  # not the request's id, which clients may repeat
        limits = [limit or 0 for limit in (key.max_concurrent, key.requests_per_minute, key.tokens_per_minute)]
        answer = await self._ask(self._admit, key, place, _LEASE_S, record.prompt_tokens, *limits)
        if answer is None:
            yield
            return
        refused, requests, tokens, wait = int(answer[0]), *map(float, answer[1:])
        record.headers.update(_headers(key, requests, tokens))
        if refused:
            raise _refusal(key, refused, wait)
        self._running[place] = key
        try:
            yield
        finally:
            del self._running[place]
            # Shielded: a client that leaves cancels the request, and must not keep its place for it.
            await asyncio.shield(self._ask(self._settle, key, place, record.completion_tokens, limits[2]))

    async def _ask(self, script: Any, key: Key, *arguments: str | float) -> list[bytes] | None:
        """What a script answers; None from a Redis that is away."""
        if time.monotonic() < self._away_until:
            return None
        keys = [f"{self._prefix}{key.name}", self._leases(key)]
        try:
            answer: list[bytes] = await script(keys=keys, args=arguments)
        except (RedisError, OSError) as error:
            self._away(error)
            return None
        if not self._healthy:
            self._healthy = True
            log.warning("Redis is back: the limits of API keys are kept again")
        return answer if answer is not None else []

    def _away(self, error: Exception) -> None:
        self._away_until = time.monotonic() + _PAUSE_S
        if self._healthy:
            self._healthy = False
            log.warning("Redis is away, the limits of API keys are not kept: %s", error)

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(_LEASE_S / 3)
            for place, key in list(self._running.items()):
                if key.max_concurrent is None or place not in self._running or time.monotonic() < self._away_until:
                    continue
                try:
                    await self._renew(keys=[self._leases(key)], args=[_LEASE_S, place])
                except (RedisError, OSError) as error:
                    self._away(error)

    def _leases(self, key: Key) -> str:
        return f"{self._prefix}{key.name}:running"


def _headers(key: Key, requests: float, tokens: float) -> dict[str, str]:
    headers: dict[str, str] = {}
    levels = (("requests", key.requests_per_minute, requests), ("tokens", key.tokens_per_minute, tokens))
    for what, limit, left in levels:
        if limit is not None:
            headers[f"x-ratelimit-limit-{what}"] = str(limit)
            headers[f"x-ratelimit-remaining-{what}"] = str(max(0, math.floor(left)))
            headers[f"x-ratelimit-reset-{what}"] = f"{max(0.0, (limit - left) * 60 / limit):.3f}s"
    return headers


def _refusal(key: Key, refused: int, wait_s: float) -> ApiError:
    what, field = _REFUSALS[refused]
    return ApiError(
        429,
        f"Rate limit reached for the key `{key.name}` in {what}: limit {getattr(key, field)}. "
        f"Please try again in {wait_s:.3f}s.",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(max(1, math.ceil(wait_s)))},
    )
