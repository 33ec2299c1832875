"""Two processes talk only if both know the secret, serve the same model and mean the same kind of connection."""

from __future__ import annotations

import pytest

from experts.wire.handshake import ClientHandshake, HandshakeError, Purpose, ServerHandshake


def shake(client: ClientHandshake, server: ServerHandshake) -> None:
    client.finish(server.verdict(client.answer(server.reply(client.hello))))


def test_equals_are_welcome() -> None:
    client = ClientHandshake(b"secret", Purpose.EXPERT, "model")
    server = ServerHandshake(b"secret", Purpose.EXPERT, "model")
    shake(client, server)
    assert server.refusal is None


@pytest.mark.parametrize(
    ("secret", "purpose", "model", "reason"),
    [
        (b"other", Purpose.EXPERT, "model", "secret"),
        (b"secret", Purpose.CONTROL, "model", "purpose"),
        (b"secret", Purpose.EXPERT, "other", "another model"),
    ],
)
def test_a_stranger_is_refused_by_both_sides(secret: bytes, purpose: Purpose, model: str, reason: str) -> None:
    client = ClientHandshake(b"secret", Purpose.EXPERT, "model")
    server = ServerHandshake(secret, purpose, model)
    with pytest.raises(HandshakeError, match=reason):
        shake(client, server)
    assert server.refusal is not None


@pytest.mark.parametrize(("secret", "model"), [(b"other", "model"), (b"secret", "other")])
def test_the_server_tells_a_client_that_lies_why_it_is_refused(secret: bytes, model: str) -> None:
    client = ClientHandshake(secret, Purpose.EXPERT, model)
    server = ServerHandshake(b"secret", Purpose.EXPERT, "model")
    server.reply(client.hello)
    verdict = server.verdict(bytes(32) if secret == b"other" else _proof_of(client, server))
    with pytest.raises(HandshakeError, match="secret" if secret == b"other" else "model"):
        client.finish(verdict)
    assert server.refusal is not None


def _proof_of(client: ClientHandshake, server: ServerHandshake) -> bytes:
    """The proof of a client that ignores that the server's model is another."""
    liar = ClientHandshake(b"secret", Purpose.EXPERT, "model")
    liar.hello = client.hello
    return liar.answer(server.reply(client.hello))


def test_an_old_proof_is_worthless_in_a_new_handshake() -> None:
    client = ClientHandshake(b"secret", Purpose.EXPERT, "model")
    first, second = (ServerHandshake(b"secret", Purpose.EXPERT, "model") for _ in range(2))
    proof = client.answer(first.reply(client.hello))
    second.reply(client.hello)
    second.verdict(proof)
    assert second.refusal is not None


def test_garbage_is_no_hello() -> None:
    with pytest.raises(HandshakeError, match="protocol"):
        ServerHandshake(b"secret", Purpose.EXPERT, "model").reply(b"GET / HTTP/1.1\r\n".ljust(70))
