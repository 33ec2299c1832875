"""Frames and connections: a 4-byte little-endian length, then one MessagePack message of `gateway.messages`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

import msgspec

from experts.wire import handshake, sockets
from experts.wire.handshake import ClientHandshake, HandshakeError, Purpose, ServerHandshake
from gateway.messages import FromGateway, ToGateway

MAX_FRAME = 16 << 20
"""Bytes of one message at most: a prompt of three million tokens."""
MAX_UNREAD = 64 << 20
"""Bytes the other side may leave unread before it counts as gone."""

_LENGTH = struct.Struct("<I")
_encoder = msgspec.msgpack.Encoder()
to_gateway = msgspec.msgpack.Decoder(ToGateway)
from_gateway = msgspec.msgpack.Decoder(FromGateway)


class LinkError(ConnectionError):
    """The other side sent what is no message, or stopped reading: the connection is of no further use."""


def pack(message: ToGateway | FromGateway) -> bytes:
    """`message` as one frame; raise LinkError where it is larger than MAX_FRAME."""
    payload = _encoder.encode(message)
    if len(payload) > MAX_FRAME:
        raise LinkError(f"a message of {len(payload)} bytes: at most {MAX_FRAME} travel between api and gateway")
    return _LENGTH.pack(len(payload)) + payload


class Link:
    """One authenticated connection: whole frames out, whole payloads in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, address: str, secret: bytes, fingerprint: str, timeout_s: float) -> Link:
        """Connect and prove the secret; raise OSError (HandshakeError, TimeoutError among them) where that fails."""
        async with asyncio.timeout(timeout_s):
            reader, writer = await open_streams(address, timeout_s)
            try:
                await _greet(reader, writer, ClientHandshake(secret, Purpose.CONTROL, fingerprint))
            except BaseException:
                writer.close()
                raise
        return cls(reader, writer)

    @classmethod
    async def accept(
        cls,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        secret: bytes,
        fingerprint: str,
        timeout_s: float,
    ) -> Link:
        """Judge who connected; raise HandshakeError, or TimeoutError where the client stays silent."""
        async with asyncio.timeout(timeout_s):
            await _receive(reader, writer, ServerHandshake(secret, Purpose.CONTROL, fingerprint))
        return cls(reader, writer)

    def send(self, frame: bytes) -> None:
        """Queue a `pack`ed frame; raise LinkError where the other side stopped reading or is gone."""
        transport = self._writer.transport
        if transport.is_closing():
            raise LinkError("the connection is closed")
        if transport.get_write_buffer_size() > MAX_UNREAD:
            transport.abort()
            raise LinkError(f"the other side left {MAX_UNREAD} bytes unread")
        self._writer.write(frame)

    async def receive(self) -> bytes | None:
        """The next payload; None where the other side hung up. Raise LinkError for an oversized frame."""
        try:
            (size,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if size > MAX_FRAME:
                raise LinkError(f"a frame of {size} bytes: at most {MAX_FRAME} are taken")
            return await self._reader.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionResetError, BrokenPipeError):
            return None

    async def aclose(self) -> None:
        """Hang up."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def abort(self) -> None:
        """Hang up at once, dropping what was not sent yet."""
        self._writer.transport.abort()


async def open_streams(address: str, timeout_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect outside the event loop: uvloop, which Ray Serve runs, knows no abstract Unix addresses."""
    sock = await asyncio.to_thread(sockets.connect, address, timeout_s)
    sock.setblocking(False)
    notice_dead_hosts(sock)
    opening = asyncio.open_unix_connection if sock.family == socket.AF_UNIX else asyncio.open_connection
    return await opening(sock=sock)


def notice_dead_hosts(sock: socket.socket) -> None:
    """Make TCP report, within about 10 s, a host that fell silent; a process that dies is seen at once anyway.

    Set on a listener it holds for the connections it accepts.
    """
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 4),
        (socket.TCP_KEEPINTVL, 2),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, 10_000),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


async def _greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, shake: ClientHandshake) -> None:
    try:
        writer.write(shake.hello)
        writer.write(shake.answer(await reader.readexactly(handshake.REPLY_SIZE)))
        shake.finish(await reader.readexactly(handshake.VERDICT_SIZE))
    except asyncio.IncompleteReadError as error:
        raise HandshakeError("the other side hung up during the handshake") from error


async def _receive(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, shake: ServerHandshake) -> None:
    try:
        writer.write(shake.reply(await reader.readexactly(handshake.HELLO_SIZE)))
        writer.write(shake.verdict(await reader.readexactly(handshake.PROOF_SIZE)))
        await writer.drain()
    except asyncio.IncompleteReadError as error:
        raise HandshakeError("the other side hung up during the handshake") from error
    if shake.refusal:
        raise shake.refusal
