"""Going away: 503 for new requests, running ones finish, late ones are told."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from gateway.api.drain import Drain
from gateway.api.errors import ApiError
from placement.policy import ApiPolicy
from tests.gateway.api.serving import TEXT, Api, api_of, error_of, events_of, saying, until_running
from tests.gateway.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


async def leave(api: Api) -> asyncio.Task[None]:
    """Begin to shut the application down, as Serve and uvicorn do."""
    stop = asyncio.Event()

    async def live() -> None:
        async with api.app.router.lifespan_context(api.app):
            await stop.wait()

    living = asyncio.create_task(live())
    await asyncio.sleep(0)
    stop.set()
    while (await api.http.get("/health")).status_code != 503:
        await asyncio.sleep(0.01)
    return living


def texts(response: httpx.Response) -> str:
    return "".join(event["choices"][0]["text"] for event in events_of(response) if "choices" in event)


async def test_new_requests_are_refused_and_running_ones_finish(store: Path) -> None:
    engine = FakeEngine(saying(store, TEXT), paced=True)
    async with api_of(store, engine) as api:
        running = [asyncio.create_task(api.completion(stream=stream)) for stream in (True, False)]
        await until_running(engine, 2)
        leaving = await leave(api)
        refused = await api.completion()
        assert error_of(refused, 503)["code"] == "shutting_down"
        assert refused.headers["retry-after"] == "5"
        assert refused.headers["connection"] == "close"
        error_of(await api.http.get("/v1/models"), 503)
        assert not leaving.done()
        engine.stop_pacing()
        streamed, whole = await asyncio.gather(*running)
        assert texts(streamed) == whole.json()["choices"][0]["text"] == TEXT
        await leaving
        assert api.pool.connected == 0


async def test_those_that_take_too_long_are_told_and_cut(store: Path) -> None:
    engine = FakeEngine(saying(store, TEXT), paced=True)
    async with api_of(store, engine, policy=ApiPolicy(drain_s=0.2)) as api:
        running = [asyncio.create_task(api.completion(stream=stream, n=2)) for stream in (True, False)]
        await until_running(engine, 4)
        engine.allow(5)
        leaving = await leave(api)
        streamed, whole = await asyncio.gather(*running)
        *chunks, last = events_of(streamed)  # which checks for [DONE], too
        assert chunks
        assert "shutting down" in last["error"]["message"]
        assert "shutting down" in error_of(whole, 503)["message"]
        await leaving
        engine.stop_pacing()
        await asyncio.to_thread(engine.wait_until, lambda: not engine.running)


async def test_with_nothing_to_do_it_ends_at_once(api: Api) -> None:
    await asyncio.wait_for(await leave(api), 1)


async def test_the_limit_holds_whatever_a_request_does() -> None:
    drain, cuts = Drain(), []

    async def stuck() -> None:
        with drain.request():
            await asyncio.Event().wait()

    task = asyncio.create_task(stuck())
    await asyncio.sleep(0)
    finishing = asyncio.create_task(drain.finish(0.01, lambda: cuts.append(task.cancel())))
    await finishing
    assert len(cuts) == 1
    with pytest.raises(ApiError, match="shutting down"), drain.request():
        pass
