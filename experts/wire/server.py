"""The replica's end of the data plane: listens, authenticates gateways, runs their calls."""

from __future__ import annotations

import array
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from experts.wire import frame, sockets
from experts.wire.arena import Arena, bytes_of
from experts.wire.frame import Frame, FrameError, Kind, Segment
from experts.wire.handshake import HandshakeError, Purpose, ServerHandshake

log = logging.getLogger(__name__)

_HANDSHAKE_S = 5.0
_ENDING_S = 2.0
"""For calls under way when the server closes: Python must not end under a thread that is in compiled code."""


class NotServedError(Exception):
    """The call names a slice that is not served here; the message says which."""


class Compute(Protocol):
    """Runs segments of one layer: ``rows[N, H]`` sorted by segment in, ``out[N, H]`` written."""

    def __call__(  # noqa: D102
        self, layer: int, segments: Sequence[Segment], rows: torch.Tensor, out: torch.Tensor
    ) -> None: ...


class Shortcut(Protocol):
    """Answers calls on a descriptor, their rows in an arena's `memory`; returns where the next frame is not for it."""

    def __call__(self, descriptor: int, arena: int, memory: torch.Tensor) -> None: ...  # noqa: D102


class ExpertServer:
    """Serves `compute` to gateways that know the secret and the model; a thread for each connection.

    `threads` are torch's threads for the calls of one connection. `shortcut`, if there is one, answers calls in shared
    memory without Python, until one comes that it does not take.
    Use as a context manager; `addresses` says where it listens: a Unix socket, and TCP where a `tcp_host` is given.
    """

    def __init__(
        self,
        compute: Compute,
        secret: bytes,
        fingerprint: str,
        tcp_host: str | None = None,
        threads: int = 1,
        shortcut: Shortcut | None = None,
    ) -> None:
        self._compute = compute
        self._shortcut = shortcut
        self._threads_each = threads
        self._secret = secret
        self._fingerprint = fingerprint
        self._listeners = [sockets.listen_unix()]
        if tcp_host is not None:
            self._listeners.append(sockets.listen_tcp(tcp_host))
        self._connections: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Condition()
        self._threads = [
            threading.Thread(target=self._accept, args=(listener,), daemon=True, name="expert-accept")
            for listener in self._listeners
        ]

    @property
    def addresses(self) -> list[str]:
        """Where gateways connect to, the cheapest way first."""
        return [sockets.address_of(listener) for listener in self._listeners]

    @property
    def listening(self) -> bool:
        """Whether new gateways can still connect."""
        return all(thread.is_alive() for thread in self._threads)

    @property
    def connections(self) -> int:
        """Gateways connected now."""
        with self._lock:
            return len(self._connections)

    def drain(self, patience_s: float) -> bool:
        """Answer until all gateways have hung up, at most `patience_s` seconds; whether they have."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._connections, patience_s)

    def __enter__(self) -> ExpertServer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and hang up; every gateway sees EOF and runs its rows elsewhere."""
        with self._lock:
            for sock in [*self._listeners, *self._connections]:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that blocks on it
            serving = list(self._connections.values())
        for thread in self._threads:
            thread.join()
        for thread in serving:
            if thread is not threading.current_thread():
                thread.join(_ENDING_S)
        for listener in self._listeners:
            listener.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock = sockets.accept(listener)
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True, name="expert-serve").start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, self._registered(sock):
            try:
                sock.settimeout(_HANDSHAKE_S)
                sockets.receive(sock, ServerHandshake(self._secret, Purpose.EXPERT, self._fingerprint))
                sock.settimeout(None)
                self._prepare_thread()
                _Connection(sock, self._compute, self._shortcut).run()
            except ConnectionResetError:
                pass  # the gateway went away: nothing is owed to it
            except (HandshakeError, FrameError) as error:
                log.warning("refused a connection: %s", error)
            except OSError as error:
                log.info("connection lost: %s", error)

    def _prepare_thread(self) -> None:
        # OpenMP counts its threads for each thread that calls it: elsewhere the setting would not reach these calls.
        torch.set_num_threads(self._threads_each)
        # Batch scheduling: woken by a frame, this must not preempt the gateway while that still sends.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

    @contextlib.contextmanager
    def _registered(self, sock: socket.socket) -> Iterator[None]:
        with self._lock:
            self._connections[sock] = threading.current_thread()
        try:
            yield
        finally:
            with self._lock:
                del self._connections[sock]
                self._lock.notify_all()


class _Connection:
    """One gateway's calls, in order."""

    def __init__(self, sock: socket.socket, compute: Compute, shortcut: Shortcut | None) -> None:
        self._sock = sock
        self._compute = compute
        self._shortcut = shortcut
        self._arena: Arena | None = None
        self._head = bytearray(frame.HEADER.size + frame.SEGMENT.size)  # most calls have one segment: one read

    def run(self) -> None:
        """Answer frames until the gateway hangs up."""
        while True:
            if self._shortcut is not None and self._arena is not None:
                self._shortcut(self._sock.fileno(), self._arena.id, self._arena.memory)
            head, fds = self._next()
            try:
                if head.kind is Kind.ATTACH:
                    self._attach(head, fds)
                elif head.kind is Kind.CALL:
                    self._call(head)
                else:
                    raise FrameError(f"a gateway does not send {head.kind.name}")
            finally:
                for fd in fds:
                    os.close(fd)

    def _next(self) -> tuple[Frame, array.array[int]]:
        view, size = memoryview(self._head), frame.HEADER.size
        fds = array.array("i")
        got, control, _, _ = self._sock.recvmsg_into([view], socket.CMSG_SPACE(fds.itemsize), socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if not got:
            raise ConnectionResetError
        sockets.read_into(self._sock, view[got:size])
        got = max(got, size)
        missing = size + frame.segment_bytes(self._head[:size]) - got
        if missing < 0:
            raise FrameError("a frame without segments, and something behind it")
        tail = self._head[size:got] + (sockets.read(self._sock, missing) if missing else b"")
        return frame.unpack(self._head[:size], tail), fds

    def _attach(self, head: Frame, fds: array.array[int]) -> None:
        if len(fds) != 1:
            raise FrameError("an arena without its descriptor")
        self._arena = Arena.attach(fds[0], head.aux, head.arena)
        self._arena.fd = -1  # the mapping stays, the descriptor is closed with the frame

    def _call(self, head: Frame) -> None:
        rows, out = self._inline(head) if head.arena == frame.INLINE else self._shared(head)
        start = time.perf_counter_ns()
        try:
            self._compute(head.layer, head.segments, rows, out)
        except Exception as error:
            if not isinstance(error, NotServedError):
                log.exception("layer %d failed", head.layer)
            reason = f"{type(error).__name__}: {error}".encode()[: frame.MAX_ERROR]
            self._sock.sendall(Frame(Kind.ERROR, head.seq, aux=len(reason)).pack() + reason)
            return
        spent = time.perf_counter_ns() - start
        reply = Frame(
            Kind.REPLY, head.seq, head.layer, head.dtype, head.arena, head.offset, head.rows, head.width, spent
        )
        payload = [bytes_of(out)] if head.arena == frame.INLINE else []
        sockets.send(self._sock, reply.pack(), *payload)

    def _shared(self, head: Frame) -> tuple[torch.Tensor, torch.Tensor]:
        if self._arena is None or self._arena.id != head.arena:
            raise FrameError("a call in an arena that is not attached")
        place = (head.offset, head.rows, head.width, head.dtype)
        return self._arena.rows(*place), self._arena.results(*place)

    def _inline(self, head: Frame) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.empty(head.rows, head.width, dtype=head.dtype)
        sockets.read_into(self._sock, bytes_of(rows))
        return rows, torch.empty_like(rows)
