"""The gateway's end of the connection: runs the engine and serves any number of api processes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Mapping

import msgspec

from experts.wire import sockets
from experts.wire.handshake import HandshakeError
from gateway.link import framing
from gateway.link.engine_thread import Engine, EngineThread
from gateway.link.framing import Link, LinkError
from gateway.messages import Alive, Cancel, Delta, GatewayStatus, StatusQuery, StepOutput, Submit

log = logging.getLogger(__name__)

_HANDSHAKE_S = 5.0
_BEAT_S = 0.5
"""Between two signs of life; api processes give up on a gateway that shows none (`gateway.link.client`)."""


class GatewayServer:
    """Runs `engine` in a thread of its own and serves it on a fresh abstract Unix address, and on TCP with `tcp_host`.

    `status` is called with a query's id, in the event loop's thread; `prepare` first thing in the engine's thread.
    Use as an async context manager: leaving it hangs up on every api process, cancels what ran for them and ends the
    thread.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        secret: bytes,
        fingerprint: str,
        status: Callable[[int], GatewayStatus],
        tcp_host: str | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._secret = secret
        self._fingerprint = fingerprint
        self._status = status
        self._tcp_host = tcp_host
        self.addresses: list[str] = []
        """Where api processes connect to, the cheapest way first; empty until it listens."""
        self.healthy = True
        """False once the engine broke beyond repair: the process wants to be replaced."""
        self._engine = EngineThread[Link](engine, self._deliver, self._engine_died, prepare)
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.StreamWriter] = set()
        self._links: set[Link] = set()
        self._all_gone = asyncio.Event()
        self._all_gone.set()

    @property
    def connections(self) -> int:
        """Api processes connected now (or shaking hands)."""
        return len(self._connections)

    async def __aenter__(self) -> GatewayServer:
        self._loop = asyncio.get_running_loop()
        self._engine.start()
        self._beating = asyncio.create_task(self._beat(), name="signs-of-life")
        await self._listen(sockets.listen_unix())
        if self._tcp_host is not None:
            await self._listen(sockets.listen_tcp(self._tcp_host))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop listening, hang up, end the engine's thread after the step under way."""
        self._beating.cancel()
        self._hang_up()
        await self._all_gone.wait()
        await asyncio.to_thread(self._engine.stop)

    def _hang_up(self) -> None:
        """Every api process sees EOF and takes its sequences to another gateway."""
        for server in self._servers:
            server.close()
        for connection in self._connections:
            connection.transport.abort()

    def _engine_died(self) -> None:
        self.healthy = False
        self._loop.call_soon_threadsafe(self._hang_up)

    async def _listen(self, listener: socket.socket) -> None:
        self.addresses.append(sockets.address_of(listener))
        framing.notice_dead_hosts(listener)
        start = asyncio.start_unix_server if listener.family == socket.AF_UNIX else asyncio.start_server
        self._servers.append(await start(self._serve, sock=listener))

    def _deliver(self, outputs: Mapping[Link, list[Delta]]) -> None:
        """Called by the engine's thread: one frame for each api process, one wake-up of the loop for all."""
        frames = [(link, framing.pack(StepOutput(deltas=deltas))) for link, deltas in outputs.items()]
        self._loop.call_soon_threadsafe(_send_all, frames)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        self._all_gone.clear()
        try:
            link = await Link.accept(reader, writer, self._secret, self._fingerprint, _HANDSHAKE_S)
            await self._converse(link)
        except TimeoutError:
            log.warning("refused a connection: silent for %g s during the handshake", _HANDSHAKE_S)
        except HandshakeError as error:
            log.warning("refused a connection: %s", error)
        except OSError as error:
            log.warning("dropped a connection: %s", error)
        finally:
            writer.transport.abort()
            self._connections.discard(writer)
            if not self._connections:
                self._all_gone.set()

    async def _converse(self, link: Link) -> None:
        """Obey one api process until it hangs up, then stop what ran for it."""
        self._links.add(link)
        try:
            while (payload := await link.receive()) is not None:
                self._obey(link, payload)
        finally:
            self._links.discard(link)
            self._engine.forget(link)

    async def _beat(self) -> None:
        frame = framing.pack(Alive())
        while True:
            _send_all([(link, frame) for link in self._links])
            await asyncio.sleep(_BEAT_S)

    def _obey(self, link: Link, payload: bytes) -> None:
        try:
            message = framing.to_gateway.decode(payload)
        except msgspec.DecodeError as error:
            raise LinkError(f"garbage instead of a message: {error}") from error
        match message:
            case Submit():
                self._engine.submit(link, message)
            case Cancel():
                self._engine.cancel(link, message.request_id)
            case StatusQuery():
                link.send(framing.pack(self._status(message.query_id)))


def _send_all(frames: list[tuple[Link, bytes]]) -> None:
    for link, frame in frames:
        with contextlib.suppress(LinkError):  # it is gone, and the task that reads from it sees to the rest
            link.send(frame)
