"""The process beside a gateway that turns its routing into load: learns, records, streams. It imports no torch.

python -m gateway.load_observer     reads its orders and chunks of routing from standard input, until that ends
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec
import redis

from gateway.routing_chunk import Hello, RoutingChunk
from predictor.load_step import LoadStep
from predictor.records import RecordWriter
from predictor.shape import ModelShape
from predictor.signals import LoadSignals
from recovery import load_stream
from recovery.directory import Directory
from recovery.load_stream import LoadMessage

log = logging.getLogger(__name__)

_AGAIN_S = 2.0


class Observer:
    """Learns from chunks of routing and passes on what they make of it."""

    def __init__(self, hello: Hello, writer: RecordWriter | None) -> None:
        self._gateway = hello.gateway
        self._shape = ModelShape.from_json(hello.shape)
        self._signals = LoadSignals(self._shape)
        self._writer = writer
        self._directory = Directory(hello.redis_url, hello.namespace) if hello.redis_url else None
        self._not_before = 0.0

    def observe(self, chunk: RoutingChunk) -> None:
        """Learn from `chunk`, record its load and stream it."""
        routings = chunk.routings(len(self._shape.layers), self._shape.experts)
        steps = [self._signals.observe(routing) for routing in routings]
        if self._writer is not None:
            for step in steps:
                self._writer.append(step)
        if self._directory is not None and time.monotonic() >= self._not_before:
            self._stream(self._directory, steps, chunk.dropped)

    def _stream(self, directory: Directory, steps: list[LoadStep], dropped: int) -> None:
        try:
            load_stream.send(directory, LoadMessage.of(self._gateway, self._shape, steps, dropped))
        except (redis.RedisError, OSError) as error:
            log.warning("Redis is lost, load is not streamed: %s", error)
            self._not_before = time.monotonic() + _AGAIN_S


def messages(source: BinaryIO) -> Iterator[bytes]:
    """The messages in `source`, until it ends."""
    while len(size := source.read(4)) == 4:
        yield source.read(struct.unpack("<I", size)[0])


def main() -> None:
    """Obey."""
    # Runs where nobody else wants to: even at the lowest niceness it would now and then make the engine's threads wait.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    incoming = messages(sys.stdin.buffer)
    first = next(incoming, None)
    if first is None:
        return
    hello = msgspec.msgpack.decode(first, type=Hello)
    with contextlib.ExitStack() as exits:
        writer = None
        if hello.record is not None:
            shape = ModelShape.from_json(hello.shape)
            writer = exits.enter_context(RecordWriter(Path(hello.record), shape, hello.max_bytes))
        observer = Observer(hello, writer)
        for message in incoming:
            observer.observe(msgspec.msgpack.decode(message, type=RoutingChunk))


if __name__ == "__main__":
    main()
