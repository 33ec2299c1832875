"""The gateway's end of the data plane: one connection to one replica, one call at a time."""

from __future__ import annotations

import array
import contextlib
import dataclasses
import socket
from collections.abc import Sequence

import torch

from experts.wire import frame, sockets
from experts.wire.arena import Arena, bytes_of
from experts.wire.frame import Frame, FrameError, Kind, Segment
from experts.wire.handshake import ClientHandshake, Purpose

_SEND_S = 5.0
"""A replica that does not even read for so long is gone."""


class CallRefusedError(Exception):
    """The replica is alive but did not run the call; the message is its reason."""


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """Rows of one layer for one replica: rows and results lie at `offset` of `arena`, sorted by segment."""

    seq: int
    layer: int
    arena: Arena
    offset: int
    width: int
    dtype: torch.dtype
    segments: Sequence[Segment]

    @property
    def rows(self) -> int:
        """Rows in all segments."""
        return sum(count for _, count in self.segments)

    def results(self) -> torch.Tensor:
        """The [rows, width] view where the results are (or will be)."""
        return self.arena.results(self.offset, self.rows, self.width, self.dtype)


class Channel:
    """A connection after its handshake. Not thread-safe: the engine's thread owns it.

    `outstanding` is the call that has no reply yet; while there is one, the next call must wait.
    """

    def __init__(self, sock: socket.socket, address: str) -> None:
        self.address = address
        self.outstanding: Call | None = None
        self.shares_memory = sock.family == socket.AF_UNIX
        """Whether rows lie in an arena; otherwise they travel with the frames."""
        self._sock = sock
        self._attached = 0
        self._header = bytearray(frame.HEADER.size)

    @classmethod
    def connect(cls, address: str, secret: bytes, fingerprint: str, timeout: float = 5.0) -> Channel:
        """Connect and authenticate; raise OSError (HandshakeError among them) where that fails within `timeout` s."""
        sock = sockets.connect(address, timeout)
        try:
            sockets.greet(sock, ClientHandshake(secret, Purpose.EXPERT, fingerprint))
        except OSError:
            sock.close()
            raise
        return cls(sock, address)

    def fileno(self) -> int:
        """The connection's descriptor; -1 once it is closed."""
        return self._sock.fileno()

    def has(self, arena: Arena) -> bool:
        """Whether the replica knows `arena`: then a call in it is its frame and nothing else."""
        return self.shares_memory and self._attached == arena.id

    def pack(self, call: Call) -> bytes:
        """The frame of `call` on this channel."""
        return Frame(
            Kind.CALL, call.seq, call.layer, call.dtype, call.arena.id if self.shares_memory else frame.INLINE,
            call.offset, call.rows, call.width, 0, tuple(call.segments),
        ).pack()  # fmt: skip

    def send(self, call: Call, packed: bytes | None = None) -> None:
        """Start `call`, with the frame that `pack` made of it; raise OSError where the replica is gone."""
        head = self.pack(call) if packed is None else packed
        if self.shares_memory and self._attached != call.arena.id:
            self._attach(call.arena)
        self.outstanding = call
        self._sock.settimeout(_SEND_S)
        if self.shares_memory:
            self._sock.sendall(head)
        else:
            rows = call.arena.rows(call.offset, call.rows, call.width, call.dtype)
            sockets.send(self._sock, head, bytes_of(rows))

    def receive(self, timeout: float = 5.0, header: bytes | None = None) -> int:
        """Wait for the outstanding call's reply, `timeout` s at most; return the replica's compute time in ns.

        `header` is its beginning, where that was read already. Raise CallRefusedError where the replica says why not,
        OSError where it is gone, silent or sends garbage.
        """
        call = self.outstanding
        if call is None:
            raise FrameError("a reply nobody waits for")
        self._sock.settimeout(timeout)
        if header is None:
            sockets.read_into(self._sock, memoryview(self._header))
        reply = frame.unpack(self._header if header is None else header)
        if reply.seq != call.seq:
            raise FrameError(f"a reply to call {reply.seq}, expected {call.seq}")
        if reply.kind is Kind.ERROR:
            reason = bytes(sockets.read(self._sock, reply.aux)).decode(errors="replace")
            self.outstanding = None
            raise CallRefusedError(reason)
        if reply.kind is not Kind.REPLY or reply.rows != call.rows:
            raise FrameError("a reply that does not fit its call")
        if not self.shares_memory:
            sockets.read_into(self._sock, bytes_of(call.results()))
        self.outstanding = None
        return reply.aux

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(OSError):
            self._sock.close()

    def __del__(self) -> None:
        """A channel that left the dispatch table is closed once the engine's thread has let go of it too."""
        self.close()

    def _attach(self, arena: Arena) -> None:
        announce = Frame(Kind.ATTACH, 0, arena=arena.id, aux=2 * arena.capacity).pack()
        fds = array.array("i", [arena.fd])
        self._sock.sendmsg([announce], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        self._attached = arena.id
