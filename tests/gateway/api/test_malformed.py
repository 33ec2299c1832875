"""Hundreds of malformed requests over a real socket: never a 5xx, never an answer of another shape, never a hang."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from bench.malformed import KINDS, Malformed, malformed
from bench.raw_http import Answer, exchange
from tests.gateway.api.serving import http_server, saying
from tests.gateway.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def port(store: Path) -> Iterator[int]:
    with http_server(store, FakeEngine(saying(store, "x"))) as url:
        yield httpx.URL(url).port or 0


def check(request: Malformed, answer: Answer | None) -> None:
    if answer is None:
        assert not request.complete, request
        return
    assert 200 <= answer.status < 500, (request, answer)
    if answer.status >= 400 and answer.body:
        error = json.loads(answer.body)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert "Traceback" not in error["message"]


async def test_none_of_them_gets_more_than_a_refusal(port: int) -> None:
    together = asyncio.Semaphore(16)

    async def one(request: Malformed) -> None:
        async with together:
            check(request, await exchange(port, request.data, wait=request.complete))

    await asyncio.gather(*(one(request) for request in malformed(20 * len(KINDS), seed=1)))
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "a", "max_tokens": 1})
        assert answer.status_code == 200


def test_the_same_seed_gives_the_same_requests() -> None:
    assert list(malformed(50, seed=3)) == list(malformed(50, seed=3))
    assert {request.kind for request in malformed(len(KINDS))} == {kind.__name__.strip("_") for kind in KINDS}
