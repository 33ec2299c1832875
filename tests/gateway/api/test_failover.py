"""A gateway that goes away in mid-stream: the client sees a pause and the same text."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest

from gateway.api.app import create_app
from gateway.api.served_model import ApiConfig
from gateway.link import GatewayPool
from tests.gateway.api.serving import NAME, TEXT, events_of, saying
from tests.gateway.api.test_logprobs import as_bytes
from tests.gateway.fake_engine import MODEL, SECRET, FakeEngine, serve

pytestmark = pytest.mark.anyio


async def _no_status() -> dict[str, object]:
    return {}


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_goes_on_at_another_gateway(store: Path, n: int) -> None:
    doomed, spare = FakeEngine(saying(store, TEXT), paced=True), FakeEngine(saying(store, TEXT))
    listed: list[str] = []

    async def addresses() -> list[str]:
        return listed

    async with AsyncExitStack() as doom, serve(spare) as other, GatewayPool(addresses, SECRET, MODEL) as pool:
        listed += (await doom.enter_async_context(serve(doomed))).addresses
        app = create_app(ApiConfig(store=store, model_name=NAME), pool, _no_status)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api") as http:
            body = {
                "prompt": [5],
                "max_tokens": 60,
                "stream": True,
                "n": n,
                "stop": ["never"],
                "echo": True,
                "logprobs": 0,
            }
            streaming = asyncio.create_task(http.post("/v1/completions", json=body))
            doomed.allow(12)
            await asyncio.to_thread(doomed.wait_until, lambda: any(at >= 10 for _, at in doomed.running.values()))
            listed[:] = other.addresses
            await doom.aclose()
            chunks = events_of(await streaming)
    for index in range(n):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == "$" + TEXT
        told = [token for choice in mine for token in choice["logprobs"]["tokens"]]
        assert as_bytes(told).decode() == "$" + TEXT
        assert [choice["finish_reason"] for choice in mine if choice["finish_reason"]] == ["stop"]
    assert len(spare.submitted) == n
    assert any(submit.emitted for submit in spare.submitted)
