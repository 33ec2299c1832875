"""Addresses, listeners and exact reads for the data plane's blocking sockets.

Unix sockets use Linux's abstract namespace: no file, so nothing is left when a process is killed.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

from experts.wire import handshake


def host_id() -> str:
    """Names what can share memory and abstract sockets: this boot of this host, in this network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"


def listen_unix() -> socket.socket:
    """A listener on a fresh abstract Unix address."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(f"\0evermoe-{secrets.token_hex(12)}")
    sock.listen(64)
    return sock


def listen_tcp(host: str, port: int = 0) -> socket.socket:
    """A listener on a free TCP port of `host`."""
    return socket.create_server((host, port), backlog=64)


def address_of(sock: socket.socket) -> str:
    """The address other processes connect to: ``unix:@name`` or ``tcp:host:port``."""
    if sock.family == socket.AF_UNIX:
        name: bytes = sock.getsockname()
        return "unix:@" + name[1:].decode()
    host, port = sock.getsockname()[:2]
    return f"tcp:{host}:{port}"


def parse(address: str) -> str | tuple[str, int]:
    """What socket functions take for an ``address``; raise ValueError where it is none."""
    kind, _, rest = address.partition(":")
    if kind == "unix" and rest.startswith("@"):
        return "\0" + rest[1:]
    host, _, port = rest.rpartition(":")
    if kind != "tcp" or not host or not port.isdigit():
        raise ValueError(f"{address!r} is no address: unix:@NAME or tcp:HOST:PORT")
    return host, int(port)


def connect(address: str, timeout: float) -> socket.socket:
    """A connected socket, timeout in seconds; raise OSError where nobody listens."""
    target = parse(address)
    if isinstance(target, str):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            sock.connect(target)
        except OSError:
            sock.close()
            raise
        return sock
    sock = socket.create_connection(target, timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def accept(listener: socket.socket) -> socket.socket:
    """The next connection of `listener`; raise OSError once it is shut down."""
    sock, _ = listener.accept()
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def send(sock: socket.socket, *parts: bytes | memoryview) -> None:
    """Send all `parts` as one message (one packet where it fits)."""
    sent = sock.sendmsg(parts)
    for part in parts:
        if sent < len(part):
            sock.sendall(memoryview(part)[sent:])
        sent = max(0, sent - len(part))


def read_into(sock: socket.socket, view: memoryview) -> None:
    """Fill `view` from `sock`; raise ConnectionResetError where the other side is gone before that."""
    while len(view):
        got = sock.recv_into(view)
        if not got:
            raise ConnectionResetError("the other side closed the connection")
        view = view[got:]


def read(sock: socket.socket, size: int) -> bytearray:
    """Exactly `size` bytes from `sock`."""
    buffer = bytearray(size)
    read_into(sock, memoryview(buffer))
    return buffer


def greet(sock: socket.socket, shake: handshake.ClientHandshake) -> None:
    """Run the client's side of the handshake on a connected socket; raise HandshakeError where refused."""
    try:
        sock.sendall(shake.hello)
        sock.sendall(shake.answer(bytes(read(sock, handshake.REPLY_SIZE))))
        shake.finish(bytes(read(sock, handshake.VERDICT_SIZE)))
    except (ConnectionResetError, BrokenPipeError) as error:
        raise handshake.HandshakeError("the other side hung up during the handshake") from error


def receive(sock: socket.socket, shake: handshake.ServerHandshake) -> None:
    """Run the server's side of the handshake on an accepted socket; raise HandshakeError on refusal."""
    sock.sendall(shake.reply(bytes(read(sock, handshake.HELLO_SIZE))))
    sock.sendall(shake.verdict(bytes(read(sock, handshake.PROOF_SIZE))))
    if shake.refusal:
        raise shake.refusal
