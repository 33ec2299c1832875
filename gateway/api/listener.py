"""The api's own port. Answers go from here to the client: behind Ray Serve's proxy every token would take a detour
through a second process, which costs several times what the api itself does (bench/api_cost.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import uuid
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.api.errors import ApiError

_KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, lest they send a request into one that is just being closed."""
_MAX_HEAD = 64 << 10
"""Bytes of request line and headers at most."""
_HEAD_S = 30.0
"""They must have arrived by then."""
_BACKLOG = 4096
_CLOSE_S = 5.0


class Protocol(HttpToolsProtocol):
    """uvicorn's, with bounds for the head of a request: without them a client could send headers for ever.

    What is no HTTP is answered like every other error.
    """

    _head = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # noqa: D102
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(_HEAD_S, transport.abort)

    def data_received(self, data: bytes) -> None:  # noqa: D102
        self._head += len(data)
        super().data_received(data)
        if self._head > _MAX_HEAD:
            self.send_400_response(f"The request's head is too large: at most {_MAX_HEAD} bytes are read.")

    def send_400_response(self, msg: str) -> None:  # noqa: D102
        if self.transport.is_closing():
            return
        body = ApiError(400, msg, code="invalid_http").body()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            f"x-request-id: req-{uuid.uuid4().hex}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def on_headers_complete(self) -> None:  # noqa: D102
        self._stop_timer()
        self._head = -(1 << 62)  # the body is not part of it
        super().on_headers_complete()

    def on_message_begin(self) -> None:  # noqa: D102
        super().on_message_begin()
        self._head = 0
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(_HEAD_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: D102
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _Server(uvicorn.Server):
    """uvicorn's, without its signal handlers: signals are the business of whoever runs the process."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Capture none."""
        return contextlib.nullcontext()


@contextlib.asynccontextmanager
async def listening(app: ASGIApp, host: str, port: int) -> AsyncIterator[int]:
    """Serve `app`, whose lifespan is somebody else's, inside the context; yields the port (`port` 0: any).

    Several api processes of a host share a port (SO_REUSEPORT). Raise OSError where nobody can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=_BACKLOG, reuse_port=True)
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="error",  # uvicorn warns of every client that speaks no HTTP
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(_CLOSE_S),
        backlog=_BACKLOG,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listener]), name="http")
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        await serving
        listener.close()
