"""What is decided before a body is understood: its size, its time, whose web page it comes from."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from placement.policy import ApiPolicy
from tests.gateway.api.serving import Api, api_of, error_of, http_server, saying
from tests.gateway.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}
SMALL = ApiPolicy(max_body_mib=0.001, body_timeout_s=0.3, drain_s=0)
LIMIT = 1048


@pytest.fixture
async def small(store: Path) -> AsyncIterator[Api]:
    async with api_of(store, policy=SMALL) as api:
        yield api


def body(size: int) -> bytes:
    head, tail = b'{"prompt": [5], "max_tokens": 1, "user": "', b'"}'
    return head + b"x" * (size - len(head) - len(tail)) + tail


class TestBodySize:
    async def test_the_largest_that_fits_is_read(self, small: Api) -> None:
        answer = await small.http.post("/v1/completions", content=body(LIMIT), headers=JSON)
        assert answer.status_code == 200

    async def test_a_byte_more_is_refused(self, small: Api) -> None:
        answer = await small.http.post("/v1/completions", content=body(LIMIT + 1), headers=JSON)
        error = error_of(answer, 413)
        assert (error["code"], error["type"]) == ("request_too_large", "invalid_request_error")
        assert str(LIMIT) in error["message"]

    async def test_so_it_is_when_no_length_was_declared(self, small: Api) -> None:
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            while True:
                sent += 100
                yield b"x" * 100

        answer = await small.http.post("/v1/completions", content=endless(), headers=JSON)
        assert error_of(answer, 413)["code"] == "request_too_large"
        assert answer.headers["connection"] == "close"
        assert sent <= LIMIT + 200

    async def test_a_body_that_does_not_come_is_not_waited_for(self, store: Path) -> None:
        with http_server(store, FakeEngine(saying(store, "x")), policy=SMALL) as url:
            address = httpx.URL(url)
            with socket.create_connection((address.host, address.port or 0)) as connection:
                connection.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                    b'Content-Length: 50\r\n\r\n{"prompt"'
                )
                answer = b""
                while part := await asyncio.to_thread(connection.recv, 4096):
                    answer += part
                assert answer.startswith(b"HTTP/1.1 408 Request Timeout")
                assert b'"request_timeout"' in answer


class TestNesting:
    @pytest.mark.parametrize("depth", [100, 500, 900, 990, 1000, 5000, 100_000])
    @pytest.mark.parametrize("field", ["user", "prompt", "stop", "model", "messages"])
    async def test_a_bomb_is_defused(self, api: Api, depth: int, field: str) -> None:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            bomb = b'{"a":' * depth + b"1" + b"}" * depth
            rest = b'"prompt": [5], "max_tokens": 1, "messages": [{"role": "user", "content": "a"}]'
            content = b'{%s, "%s": %s}' % (rest, field.encode(), bomb)
            answer = await api.http.post(path, content=content, headers=JSON)
            assert answer.status_code in (200, 400), answer.text
            if answer.status_code == 400:
                error_of(answer, 400)

    @pytest.mark.parametrize("depth", [100, 200, 300, 900])
    async def test_one_in_a_message_is_too(self, api: Api, depth: int) -> None:
        content = b'{"messages": [{"role": "user", "content": "a", "extra": %s}]}' % (b"[" * depth + b"]" * depth)
        answer = await api.http.post("/v1/chat/completions", content=content, headers=JSON)
        assert answer.status_code in (200, 400), answer.text


class TestCors:
    ORIGIN = "https://example.org"

    async def test_pages_of_listed_origins_may_call(self, store: Path) -> None:
        async with api_of(store, policy=ApiPolicy(cors_origins=(self.ORIGIN,))) as api:
            asked = {"origin": self.ORIGIN, "access-control-request-method": "POST",
                     "access-control-request-headers": "authorization,content-type"}  # fmt: skip
            preflight = await api.http.options("/v1/chat/completions", headers=asked)
            assert preflight.status_code == 200
            assert preflight.headers["access-control-allow-origin"] == self.ORIGIN
            assert "authorization" in preflight.headers["access-control-allow-headers"]
            answer = await api.http.get("/v1/models", headers={"origin": self.ORIGIN})
            assert answer.headers["access-control-allow-origin"] == self.ORIGIN
            assert "x-request-id" in answer.headers["access-control-expose-headers"]

    async def test_others_and_by_default_all_may_not(self, store: Path, api: Api) -> None:
        async with api_of(store, policy=ApiPolicy(cors_origins=(self.ORIGIN,))) as listed:
            for each in (listed, api):
                answer = await each.http.get("/v1/models", headers={"origin": "https://evil.example"})
                assert "access-control-allow-origin" not in answer.headers
