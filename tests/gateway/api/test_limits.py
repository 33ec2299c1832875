"""What a key may use, with a real Redis."""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.api.keys import load_keys
from gateway.api.limits import Limits
from placement.policy import KeyPolicy
from recovery.redis_server import RedisServer
from tests.gateway.api.serving import TEXT, Api, api_of, error_of, saying, until_running
from tests.gateway.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio

SECRET = "sk-ours"


@asynccontextmanager
async def limited(
    store: Path, redis_url: str, engine: FakeEngine | None = None, namespace: str | None = None, **policy: Any
) -> AsyncIterator[Api]:
    """An api with one key, used by its client."""
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    keys = load_keys([KeyPolicy(name="ours", sha256=digest, **policy)])
    async with (
        Limits(redis_url, namespace or uuid.uuid4().hex) as limits,
        api_of(store, engine, limits=limits, keys=keys) as api,
    ):
        api.http.headers["authorization"] = f"Bearer {SECRET}"
        yield api


def refused(answer: httpx.Response, what: str) -> float:
    """Seconds to wait, after checking that the answer says that `what` is used up."""
    error = error_of(answer, 429)
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert f"in {what}" in error["message"]
    assert "`ours`" in error["message"]
    return float(answer.headers["retry-after"])


async def test_requests_per_minute(store: Path, redis_url: str) -> None:
    async with limited(store, redis_url, requests_per_minute=3) as api:
        left = [(await api.completion()).headers["x-ratelimit-remaining-requests"] for _ in range(3)]
        assert left == ["2", "1", "0"]
        answer = await api.completion()
        assert 1 <= refused(answer, "requests per minute") <= 20
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert 0 < float(answer.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 60
        assert len(api.engine.submitted) == 3


async def test_a_stream_is_told_before_it_begins(store: Path, redis_url: str) -> None:
    async with limited(store, redis_url, requests_per_minute=1) as api:
        assert (await api.completion(stream=True)).headers["x-ratelimit-remaining-requests"] == "0"
        refused(await api.completion(stream=True), "requests per minute")


async def test_requests_that_are_not_valid_cost_nothing(store: Path, redis_url: str) -> None:
    async with limited(store, redis_url, requests_per_minute=1) as api:
        error_of(await api.completion(temperature=-1), 400)
        assert (await api.completion()).status_code == 200


async def test_what_is_used_comes_back_steadily(store: Path, redis_url: str) -> None:
    async with limited(store, redis_url, requests_per_minute=600) as api:
        await asyncio.gather(*(api.completion(max_tokens=1) for _ in range(5)))
        await asyncio.sleep(0.25)  # at ten a second
        answer = await api.completion(max_tokens=1)
        assert int(answer.headers["x-ratelimit-remaining-requests"]) >= 595


async def test_tokens_of_prompts_and_answers_per_minute(store: Path, redis_url: str) -> None:
    async with limited(store, redis_url, tokens_per_minute=100) as api:
        answers = [await api.completion(prompt=[5] * 10, max_tokens=20, ignore_eos=True) for _ in range(5)]
        left = [int(answer.headers["x-ratelimit-remaining-tokens"]) for answer in answers]
        assert left[0] == 90
        assert left[1] in range(60, 63)
        assert left[2] in range(30, 35)
        assert 1 <= refused(answers[4], "tokens per minute") <= 19


async def test_requests_at_a_time(store: Path, redis_url: str) -> None:
    engine = FakeEngine(saying(store, TEXT), paced=True)
    async with limited(store, redis_url, engine, max_concurrent=2) as api:
        running = [asyncio.create_task(api.completion(stream=stream)) for stream in (True, False)]
        await until_running(engine, 2)
        refused(await api.completion(), "requests at a time")
        engine.stop_pacing()
        assert [(await request).status_code for request in running] == [200, 200]
        assert (await api.completion()).status_code == 200


async def test_a_client_that_leaves_makes_room(store: Path, redis_url: str) -> None:
    engine = FakeEngine(saying(store, TEXT), paced=True)
    async with limited(store, redis_url, engine, max_concurrent=1) as api:
        running = asyncio.create_task(api.completion())
        await until_running(engine, 1)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        engine.stop_pacing()
        assert (await api.completion()).status_code == 200


async def test_all_api_processes_count_together(store: Path, redis_url: str) -> None:
    namespace = uuid.uuid4().hex
    async with (
        limited(store, redis_url, namespace=namespace, requests_per_minute=1) as one,
        limited(store, redis_url, namespace=namespace, requests_per_minute=1) as other,
    ):
        assert (await one.completion()).status_code == 200
        refused(await other.completion(), "requests per minute")


async def test_a_request_id_that_is_used_twice_buys_nothing(store: Path, redis_url: str) -> None:
    engine = FakeEngine(saying(store, TEXT), paced=True)
    async with limited(store, redis_url, engine, max_concurrent=1) as api:
        api.http.headers["x-request-id"] = "same"
        running = asyncio.create_task(api.completion())
        await until_running(engine, 1)
        refused(await api.completion(), "requests at a time")
        engine.stop_pacing()
        await running


async def test_without_redis_requests_are_served_and_the_log_says_so_once(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with RedisServer() as server:
        url = server.url
        async with limited(store, url, requests_per_minute=2) as api:
            assert "x-ratelimit-limit-requests" in (await api.completion()).headers
            server.__exit__()
            answers = [await api.completion() for _ in range(4)]
            assert [answer.status_code for answer in answers] == [200] * 4
            assert "x-ratelimit-limit-requests" not in answers[-1].headers
            assert caplog.text.count("Redis is away") == 1
