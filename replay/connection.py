"""HTTP/1.1 connections that cost little: many streams at a time, each byte handed over as it arrives.

A general client takes several times the processor time, and with it the accuracy of when requests are sent.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

_IDLE_S = 4.0  # many servers hang up on connections that were idle for 5 s

Take = Callable[["Answer", bytes], None]
"""Takes a part of an answer's body; what it raises ends the connection, and the request with it."""


class HungUpError(ConnectionError):
    """The connection ended before the answer did."""


@dataclass
class Answer:
    """An answer, as far as it has come."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    """Names in lower case"""
    at: float = 0.0
    """When the latest bytes came, on the monotonic clock"""


class Connections:
    """As many connections to one server as it takes; those that are free again are used first."""

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        """`url` has no ``/v1``, and may have a path; `headers` go with every request."""
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        self._host, self._port = parts.hostname or "", parts.port or (443 if secure else 80)
        self._tls = ssl.create_default_context() if secure else None
        self._path = parts.path.rstrip("/")
        fields = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": "application/json", **(headers or {})}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._idle: deque[_Connection] = deque()

    async def post(self, path: str, body: bytes, headers: dict[str, str], take: Take) -> Answer:
        """Send a request, give `take` the answer's body as it comes, and return when it has ended.

        Raise HungUpError, OSError where there is no connection, or what `take` raises.
        """
        connection = self._free() or await self._connect()
        own = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST {self._path}{path} HTTP/1.1\r\n{self._head}{own}Content-Length: {len(body)}\r\n\r\n"
        try:
            answer = await connection.ask(head.encode("latin-1") + body, take)
        except BaseException:
            connection.close()
            raise
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return answer

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().close()

    def _free(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()  # the latest: the others may grow old
            if connection.reusable and time.monotonic() - connection.answer.at < _IDLE_S:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        return connection


class _Connection(asyncio.Protocol):
    """One request after another."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.reusable = False
        self._transport: asyncio.Transport | None = None
        self._take: Take | None = None
        self._ended: asyncio.Future[Answer] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._until_close = False

    async def ask(self, data: bytes, take: Take) -> Answer:
        """Send a request and wait for the end of its answer."""
        if self._transport is None or self._transport.is_closing():
            raise HungUpError("the connection is closed")
        self.answer, self._take, self.reusable = Answer(at=time.monotonic()), take, False
        self._parser = httptools.HttpResponseParser(self)
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        return await self._ended

    def close(self) -> None:
        """Hang up."""
        self.reusable = False
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.answer.at = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._fail(error.__context__ or error)
        except httptools.HttpParserError as error:
            self._fail(HungUpError(f"no HTTP: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        if error is None and self._until_close:
            self._succeed()
        else:
            self._fail(HungUpError(str(error or "closed")))

    # What the parser calls

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header."""
        self.answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Note the status, and how the end of the body will be known."""
        self.answer.status = self._parser.get_status_code()
        told = self.answer.headers.keys() & {"content-length", "transfer-encoding"}
        self._until_close = not told and self.answer.status not in (204, 304)

    def on_body(self, body: bytes) -> None:
        """Hand over a part of the body."""
        if self._take is not None:
            self._take(self.answer, body)

    def on_message_complete(self) -> None:
        """The answer has ended, unless it only told us to go on."""
        if self.answer.status >= 200:
            self._until_close = False
            self.reusable = self._parser.should_keep_alive()
            self._succeed()

    def _succeed(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(self.answer)

    def _fail(self, error: BaseException) -> None:
        self.close()
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)
