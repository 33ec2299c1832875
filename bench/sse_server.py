"""The least of a server that streams completions, in a process of its own, and when each request reached it."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import cast

import uvloop

_CHUNK = (
    b'data: {"choices":[{"index":0,"text":" word","finish_reason":null}],'
    b'"usage":{"prompt_tokens":9,"completion_tokens":%d}}\n\n'
)
_END = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":%d}}\n\ndata: [DONE]\n\n'
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class _Answers:
    """What the server says, and when it was asked."""

    def __init__(self, tokens: int, gap_s: float) -> None:
        self.arrivals: dict[str, float] = {}
        self.gap_s = gap_s
        self.chunks = [_chunk(_CHUNK % (n + 1)) for n in range(tokens)]
        self.chunks[0] = _HEAD + self.chunks[0]
        self.chunks[-1] += _chunk(_END % tokens) + b"0\r\n\r\n"


class _Connection(asyncio.Protocol):
    """One request after another, each read as cheaply as can be."""

    def __init__(self, answers: _Answers) -> None:
        self._answers = answers
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        if len(body) < int(fields[b"content-length"]):
            return
        self._answers.arrivals[fields[b"x-request-id"].decode()] = now
        self._received = b""
        self._later(0)

    def _later(self, number: int) -> None:
        asyncio.get_running_loop().call_later(self._answers.gap_s, self._say, number)

    def _say(self, number: int) -> None:
        self._transport.write(self._answers.chunks[number])
        if number + 1 < len(self._answers.chunks):
            self._later(number + 1)


def _run(pipe: Connection, tokens: int, gap_s: float) -> None:
    async def main() -> None:
        answers = _Answers(tokens, gap_s)
        loop = asyncio.get_running_loop()
        listening = await loop.create_server(lambda: _Connection(answers), "127.0.0.1", 0, backlog=4096)
        pipe.send(listening.sockets[0].getsockname()[1])
        await loop.run_in_executor(None, pipe.recv)
        pipe.send(answers.arrivals)

    uvloop.run(main())


@contextlib.contextmanager
def sse_server(tokens: int, gap_s: float) -> Iterator[tuple[int, Callable[[], dict[str, float]]]]:
    """A server on this machine whose answers have `tokens` tokens, `gap_s` apart: its port, and what ends it.

    The latter gives each request's arrival on the monotonic clock, which all processes share, by its ``x-request-id``.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(theirs, tokens, gap_s), daemon=True)
    process.start()

    def arrivals() -> dict[str, float]:
        ours.send(None)
        found: dict[str, float] = ours.recv()
        return found

    try:
        yield ours.recv(), arrivals
    finally:
        process.terminate()
        process.join()
