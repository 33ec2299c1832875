"""What a request passes before its body is read: is the server going away, who asks, and how large is it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.drain import Drain
from gateway.api.errors import ApiError
from gateway.api.keys import Key, identify
from gateway.api.limits import Limits
from gateway.api.request_record import RequestRecord

GUARDED = ("/v1/", "/tokenize", "/detokenize")
"""Paths that need a key where there are any; health, metrics, status, version and the API's description do not."""


class Gate:
    """ASGI middleware: refuses requests while draining, and those without a key; leaves a `Caller` in the scope."""

    def __init__(self, app: ASGIApp, keys: Sequence[Key], drain: Drain, limits: Limits | None) -> None:
        self._app = app
        self._keys = keys
        self._drain = drain
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 - ASGI's own
        if scope["type"] != "http" or not scope["path"].startswith(GUARDED):
            await self._app(scope, receive, send)
            return
        try:
            with self._drain.request():
                record, key = RequestRecord.of(scope), None
                if self._keys:
                    key = identify(self._keys, Headers(scope=scope).get("authorization"))
                    record.key = key.name
                async with AsyncExitStack() as exits:
                    scope["state"]["caller"] = Caller(key, self._limits, record, exits)
                    await self._app(scope, receive, send)
        except ApiError as error:
            await _refuse(error, scope, receive, send)


class Caller:
    """Who asks, for as long as the request lasts."""

    def __init__(self, key: Key | None, limits: Limits | None, record: RequestRecord, exits: AsyncExitStack) -> None:
        self._key = key
        self._limits = limits
        self._record = record
        self._exits = exits

    @classmethod
    def of(cls, scope: Scope) -> Caller:
        """The caller of a request that passed the gate."""
        caller: Caller = scope["state"]["caller"]
        return caller

    async def admit(self) -> None:
        """Take what the request (whose prompt is counted) uses from what its key may; raise a 429."""
        if self._key is not None and self._key.limited and self._limits is not None:
            await self._exits.enter_async_context(self._limits.admitted(self._key, self._record))


class BodyLimit:
    """ASGI middleware: reads the whole body, at most `limit` bytes of it and for `timeout_s` seconds."""

    def __init__(self, app: ASGIApp, limit: int, timeout_s: float) -> None:
        self._app = app
        self._limit = limit
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102 - ASGI's own
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope).get("content-length"), receive)
        except ApiError as error:
            await _refuse(error, scope, receive, send)
            return
        if body is not None:  # None: the client is gone
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, declared: str | None, receive: Receive) -> bytes | None:
        if declared is not None and declared.isdigit() and int(declared) > self._limit:
            raise self._too_large(hang_up=int(declared) > 8 * self._limit)
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._limit:
                        raise self._too_large(hang_up=True)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            text = f"The request body did not arrive within {self._timeout_s:g} seconds."
            raise ApiError(408, text, code="request_timeout", headers={"Connection": "close"}) from None

    def _too_large(self, hang_up: bool) -> ApiError:
        """With `hang_up` what still comes is not waited for."""
        text = f"The request body is too large: at most {self._limit} bytes are read."
        return ApiError(413, text, code="request_too_large", headers={"Connection": "close"} if hang_up else None)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` as if nobody had read the body yet."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    RequestRecord.of(scope).error = error.code
    await error.response()(scope, receive, send)
