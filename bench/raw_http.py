"""HTTP by hand, for requests that no client library would send."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass

_TIMEOUT_S = 60.0


class HangError(RuntimeError):
    """The server neither answered nor hung up."""


@dataclass(frozen=True)
class Answer:
    """What came back first on a connection."""

    status: int
    body: bytes


async def exchange(port: int, data: bytes, *, wait: bool = True) -> Answer | None:
    """Send `data` and return the answer; None where the server hung up without one.

    With `wait` false the client closes its side at once and takes what comes. Raise HangError after a minute.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            with contextlib.suppress(ConnectionError):
                writer.write(data)
                if not wait:
                    writer.write_eof()
                while part := await reader.read(1 << 16):
                    received += part
    except TimeoutError:
        raise HangError(f"no answer to {data[:200]!r}") from None
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return parse(received)


def parse(received: bytes) -> Answer | None:
    """The first answer in `received`, its chunks joined; None where there is none."""
    while received.startswith(b"HTTP/1.1 100 "):
        received = received.partition(b"\r\n\r\n")[2]
    head, _, body = received.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1."):
        return None
    lines = head.lower().split(b"\r\n")
    length = next((int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")), None)
    return Answer(int(head.split()[1]), body if length is None else body[:length])


async def vanish(port: int, data: bytes, after: int, *, reset: bool) -> int:
    """Send `data`, read `after` bytes of the answer and vanish, with a TCP reset or without; what was read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    seen = 0
    async with asyncio.timeout(_TIMEOUT_S):
        while seen < after and (part := await reader.read(512)):
            seen += len(part)
    if reset:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    else:
        writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return seen
