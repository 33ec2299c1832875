"""The api's own port: what is no HTTP gets an error like any other, and no head is read for ever."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.gateway.api.serving import http_server, saying
from tests.gateway.fake_engine import FakeEngine


@pytest.fixture(scope="module")
def url(store: Path) -> Iterator[str]:
    with http_server(store, FakeEngine(saying(store, "x"))) as url:
        yield url


def talk(url: str, data: bytes, *, half_close: bool = True) -> bytes:
    """What the server says to `data` until it hangs up."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port or 0), timeout=10) as connection:
        answer = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                answer += part
        return answer


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS client
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET \x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET / HTTP/1.1\r\nBad Header\x01: a\r\n\r\n",
    ],
)
def test_what_is_no_http_is_told_so(url: str, data: bytes) -> None:
    head, _, body = talk(url, data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request")
    assert b"x-request-id: req-" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{url}/health").status_code == 200


def test_an_endless_head_is_cut_off(url: str) -> None:
    answer = talk(url, b"GET /health HTTP/1.1\r\n" + b"x-more: and more\r\n" * 100_000)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_large_head_and_several_requests_on_a_connection_are_fine(url: str) -> None:
    with httpx.Client(headers={"x-long": "y" * 30_000}) as client:
        assert [client.get(f"{url}/health").status_code for _ in range(5)] == [200] * 5


def test_requests_in_a_row_without_waiting_are_answered_in_order(url: str) -> None:
    one = b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    answer = talk(url, one + one + last, half_close=False)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.endswith(b'{"status":"ok"}')
