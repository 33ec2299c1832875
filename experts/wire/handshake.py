"""Mutual authentication of two Evermoe processes, without I/O.

Both sides prove that they know the cluster secret (HMAC-SHA256 over both nonces) and learn the other's model
fingerprint. Three fixed-size messages and a verdict byte; the caller moves the bytes, so the same code serves
blocking sockets and asyncio:

    client                         server
    hello        ->
                 <-  reply (nonce, fingerprint, server's proof)
    proof        ->
                 <-  verdict
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import secrets
import struct

MAGIC = b"EVM1"
_HEAD = struct.Struct("<4sBB32s32s")  # magic, version, purpose, nonce, fingerprint digest
_VERSION = 1
_DIGEST = 32

HELLO_SIZE = _HEAD.size
REPLY_SIZE = _HEAD.size + _DIGEST
PROOF_SIZE = _DIGEST
VERDICT_SIZE = 1


class Purpose(enum.IntEnum):
    """What the connection is for; both sides must agree."""

    EXPERT = 1
    CONTROL = 2


class HandshakeError(ConnectionError):
    """The other side is not who it must be; the message names the reason."""


class _Verdict(enum.IntEnum):
    WELCOME = 0
    SECRET = 1
    MODEL = 2


def _digest(fingerprint: str) -> bytes:
    return hashlib.sha256(fingerprint.encode()).digest()


def _unpack(head: bytes, purpose: Purpose) -> tuple[bytes, bytes]:
    """Return (nonce, fingerprint digest) of a head, refusing what does not speak this protocol."""
    magic, version, theirs, nonce, fingerprint = _HEAD.unpack(head)
    if magic != MAGIC:
        raise HandshakeError("the other side does not speak Evermoe's protocol")
    if version != _VERSION:
        raise HandshakeError(
            f"the other side speaks protocol version {version}, this one {_VERSION}: upgrade the older"
        )
    if theirs != purpose:
        raise HandshakeError(f"the connection is for purpose {theirs}, this port serves {purpose.value}")
    return nonce, fingerprint


def _proof(secret: bytes, role: bytes, hello: bytes, reply_head: bytes) -> bytes:
    return hmac.digest(secret, role + hello + reply_head, "sha256")


class ClientHandshake:
    """The connecting side. Send ``hello``, then ``answer(reply)``, then check ``finish(verdict)``."""

    def __init__(self, secret: bytes, purpose: Purpose, fingerprint: str) -> None:
        self._secret = secret
        self._purpose = purpose
        self._digest = _digest(fingerprint)
        self.hello = _HEAD.pack(MAGIC, _VERSION, purpose, secrets.token_bytes(32), self._digest)

    def answer(self, reply: bytes) -> bytes:
        """Return our proof for the server's ``reply``; raise HandshakeError if it proves nothing."""
        head, proof = reply[: _HEAD.size], reply[_HEAD.size :]
        _, fingerprint = _unpack(head, self._purpose)
        if not hmac.compare_digest(proof, _proof(self._secret, b"server", self.hello, head)):
            raise HandshakeError("the other side does not know the cluster secret")
        if fingerprint != self._digest:
            raise HandshakeError("the other side serves another model (fingerprints differ)")
        return _proof(self._secret, b"client", self.hello, head)

    @staticmethod
    def finish(verdict: bytes) -> None:
        """Raise HandshakeError unless the server welcomed us."""
        if verdict != bytes([_Verdict.WELCOME]):
            reason = "another model is served there" if verdict == bytes([_Verdict.MODEL]) else "wrong cluster secret"
            raise HandshakeError(f"refused by the other side: {reason}")


class ServerHandshake:
    """The accepting side. Send ``reply(hello)``, then ``verdict(proof)``, and go on only if ``refusal`` is None."""

    def __init__(self, secret: bytes, purpose: Purpose, fingerprint: str) -> None:
        self._secret = secret
        self._purpose = purpose
        self._digest = _digest(fingerprint)
        self._hello = b""
        self._head = b""
        self._same_model = False
        self.refusal: HandshakeError | None = HandshakeError("the handshake is not finished")

    def reply(self, hello: bytes) -> bytes:
        """Return the reply to a ``hello``; raise HandshakeError for bytes that are none."""
        _, fingerprint = _unpack(hello, self._purpose)
        self._hello = hello
        self._same_model = fingerprint == self._digest
        self._head = _HEAD.pack(MAGIC, _VERSION, self._purpose, secrets.token_bytes(32), self._digest)
        return self._head + _proof(self._secret, b"server", hello, self._head)

    def verdict(self, proof: bytes) -> bytes:
        """Judge the client's ``proof``: return the byte to send and set ``refusal`` (None when welcome)."""
        if not hmac.compare_digest(proof, _proof(self._secret, b"client", self._hello, self._head)):
            self.refusal = HandshakeError("the other side does not know the cluster secret")
            return bytes([_Verdict.SECRET])
        if not self._same_model:
            self.refusal = HandshakeError("the other side serves another model (fingerprints differ)")
            return bytes([_Verdict.MODEL])
        self.refusal = None
        return bytes([_Verdict.WELCOME])
