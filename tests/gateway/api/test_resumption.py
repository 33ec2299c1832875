"""An api process that dies in the middle of an answer, and a client that asks again under its Idempotency-Key."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.api.app import create_app
from gateway.api.served_model import ApiConfig
from gateway.link import GatewayPool
from recovery import journal
from recovery.journal import Journal
from tests.gateway.api.serving import NAME, TEXT, events_of, saying
from tests.gateway.fake_engine import MODEL, SECRET, FakeEngine, serve

pytestmark = pytest.mark.anyio

BODY: dict[str, Any] = {"prompt": [5], "max_tokens": 60, "stream": True, "temperature": 0.9}


async def _no_status() -> dict[str, object]:
    return {}


@asynccontextmanager
async def an_api(store: Path, engine_address: str, kept: Journal) -> AsyncIterator[httpx.AsyncClient]:
    async def addresses() -> list[str]:
        return [engine_address]

    async with kept, GatewayPool(addresses, SECRET, MODEL) as pool:
        app = create_app(ApiConfig(store=store, model_name=NAME), pool, _no_status, journal=kept)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api") as http:
            yield http


class DyingJournal(Journal):
    """Of a process that never gets to say that a request has ended."""

    dead = False

    async def _flush(self) -> None:
        if not self.dead:
            await super()._flush()


async def die_in_the_middle(
    store: Path, engine: FakeEngine, address: str, redis_url: str, namespace: str, **wishes: Any
) -> None:
    """An api that has told ten tokens of each answer when it goes."""
    kept = DyingJournal(redis_url, namespace)
    async with an_api(store, address, kept) as http:
        asking = asyncio.create_task(
            http.post("/v1/completions", json=BODY | wishes, headers={"Idempotency-Key": "mine"})
        )
        engine.allow(10)
        n = wishes.get("n", 1)
        await asyncio.to_thread(
            engine.wait_until, lambda: [at for _, at in engine.running.values()] == [10] * n if n == 1 else
            len(engine.running) == n and all(at >= 4 for _, at in engine.running.values())
        )  # fmt: skip
        for entry in kept._entries:
            async with asyncio.timeout(10):
                while entry.written < 4:
                    await asyncio.sleep(0.01)
        kept.dead = True
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking


@pytest.fixture
def namespace() -> str:
    return uuid.uuid4().hex


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_FLUSH_S", 0.005)


@pytest.mark.parametrize("n", [1, 2])
async def test_it_gets_the_whole_answer_with_the_seed_of_then(
    store: Path, redis_url: str, namespace: str, n: int
) -> None:
    engine = FakeEngine(saying(store, TEXT), paced=True)
    async with serve(engine) as server:
        await die_in_the_middle(store, engine, server.addresses[0], redis_url, namespace, n=n)
        engine.stop_pacing()
        kept = Journal(redis_url, namespace)
        async with an_api(store, server.addresses[0], kept) as http:
            answer = await http.post("/v1/completions", json=BODY | {"n": n}, headers={"Idempotency-Key": "mine"})
            chunks = events_of(answer)
            async with asyncio.timeout(10):
                while kept._entries:
                    await asyncio.sleep(0.005)
            again = await http.post("/v1/completions", json=BODY | {"n": n}, headers={"Idempotency-Key": "mine"})
    for index in range(n):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == TEXT
    first, second, third = engine.submitted[:n], engine.submitted[n : 2 * n], engine.submitted[2 * n :]
    assert sorted(s.params.seed or 0 for s in second) == sorted(s.params.seed or 0 for s in first)
    assert all(submit.emitted for submit in second)
    assert again.status_code == 200
    assert not any(submit.emitted for submit in third), "what has ended is forgotten"
    assert engine.running == {}


async def test_log_probabilities_are_made_again_with_the_same_seed(store: Path, redis_url: str, namespace: str) -> None:
    engine = FakeEngine(saying(store, TEXT), paced=True)
    async with serve(engine) as server:
        await die_in_the_middle(store, engine, server.addresses[0], redis_url, namespace, logprobs=1)
        engine.stop_pacing()
        async with an_api(store, server.addresses[0], Journal(redis_url, namespace)) as http:
            answer = await http.post(
                "/v1/completions", json=BODY | {"logprobs": 1}, headers={"Idempotency-Key": "mine"}
            )
    told = [token for chunk in events_of(answer) for token in chunk["choices"][0]["logprobs"]["tokens"]]
    assert len(told) > 20
    assert engine.submitted[1].emitted == []
    assert engine.submitted[1].params.seed == engine.submitted[0].params.seed


async def test_another_body_under_the_same_key_is_refused(store: Path, redis_url: str, namespace: str) -> None:
    engine = FakeEngine(saying(store, TEXT), paced=True)
    async with serve(engine) as server:
        await die_in_the_middle(store, engine, server.addresses[0], redis_url, namespace)
        engine.stop_pacing()
        async with an_api(store, server.addresses[0], Journal(redis_url, namespace)) as http:
            other = await http.post("/v1/completions", json=BODY | {"prompt": [6]}, headers={"Idempotency-Key": "mine"})
            assert other.status_code == 422
            assert other.json()["error"]["code"] == "idempotency_key_reused"
            own = await http.post("/v1/completions", json=BODY | {"prompt": [6]}, headers={"Idempotency-Key": "new"})
            assert own.status_code == 200


async def test_a_key_that_is_none_is_a_400(store: Path, redis_url: str, namespace: str) -> None:
    async with (
        serve(FakeEngine()) as server,
        an_api(store, server.addresses[0], Journal(redis_url, namespace)) as http,
    ):
        answer = await http.post("/v1/completions", json=BODY, headers={"Idempotency-Key": "k" * 256})
        assert answer.status_code == 400
        assert "Idempotency-Key" in answer.json()["error"]["message"]
