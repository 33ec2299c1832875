"""Real gateway processes, killed with SIGKILL in the middle of answers: clients get what they would have got."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from deploy.models import DEFAULT_MODEL
from experts.store import ExpertStore, prepare
from gateway.api.app import create_app
from gateway.api.served_model import ApiConfig
from gateway.keeper import GatewayFailedError, Keeper
from gateway.link import GatewayPool
from gateway.messages import Delta, Submit
from gateway.nursery import Order
from placement.policy import Policy
from recovery.directory import Directory

pytestmark = pytest.mark.anyio

PROMPT = "import os\n\ndef main():\n"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "ages": {"type": "array", "items": {"type": "integer"},
                                                                       "minItems": 3, "maxItems": 6}},
    "required": ["name", "ages"],
    "additionalProperties": False,
}  # fmt: skip
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 0.9, "top_p": 0.95, "seed": 7},
    "penalties": {"temperature": 0.8, "seed": 3, "presence_penalty": 0.7, "frequency_penalty": 0.5,
                  "repetition_penalty": 1.2},
    "logprobs": {"temperature": 0.7, "seed": 5, "logprobs": 2, "echo": True},
    "several": {"temperature": 0.9, "seed": 11, "n": 3},
    "grammar": {"temperature": 0.8, "seed": 2, "response_format": {
        "type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}},
    "stop strings": {"temperature": 0.9, "seed": 23, "stop": ["return", "zzz"], "min_tokens": 6},
    "bias": {"temperature": 0.8, "seed": 1, "logit_bias": {"300": 4.0}, "min_tokens": 30},
}  # fmt: skip


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    return prepare(DEFAULT_MODEL, tmp_path_factory.mktemp("model") / "store", dtype="float32")


class DeadlyPool(GatewayPool):
    """Kills whatever gateways there are when a request has got so many deltas."""

    def __init__(self, directory: Directory, fingerprint: str) -> None:
        async def addresses() -> list[str]:
            return [entry.addresses[0] for entry in await asyncio.to_thread(directory.gateways)]

        super().__init__(addresses, directory.secret(), fingerprint)
        self.kill_after: tuple[int, ...] = ()
        self.killed: list[int] = []
        self.seen = 0
        self._directory = directory

    async def generate(self, submit: Submit) -> AsyncGenerator[Delta, None]:
        async with contextlib.aclosing(super().generate(submit)) as deltas:
            async for delta in deltas:
                self.seen += 1
                if self.seen in self.kill_after:
                    self.kill()
                yield delta

    def kill(self) -> None:
        """Kill the gateway that has the most to do."""
        busiest = max(
            (client for client in self._clients.values() if client.alive), key=lambda client: client.sequences
        )
        for entry in self._directory.gateways():
            if busiest.address in entry.addresses:
                os.kill(entry.pid, signal.SIGKILL)
                self.killed.append(entry.pid)


def order(model: ExpertStore, directory: Directory, name: str) -> Order:
    policy = Policy.model_validate({"gateway": {"kv_cache_gib": 0.05, "threads": 1}, "predictor": {"enabled": False},
                                    "api": {"drain_s": 0}})  # fmt: skip
    return Order(
        store=str(model.path), policy=policy.model_dump_json(), redis_url=directory.url, namespace=directory.namespace,
        name=name, node="n", node_ip="127.0.0.1", compiled=None, record=None,
    )  # fmt: skip


class Served:
    """An api in this process over gateways in processes of their own."""

    def __init__(self, pool: DeadlyPool, http: httpx.AsyncClient) -> None:
        self.pool = pool
        self._http = http

    async def ask(self, wishes: dict[str, Any], kill_after: tuple[int, ...] = ()) -> list[dict[str, Any]]:
        """The answer's choices, put together again where they were streamed; gateways are killed on the way."""
        self.pool.kill_after, self.pool.seen = kill_after, 0
        chat = "response_format" in wishes
        body: dict[str, Any] = {"max_tokens": 60, **wishes}
        body |= {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
        answer = await self._http.post("/v1/chat/completions" if chat else "/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        if not body.get("stream"):
            return [plain(choice, chat) for choice in answer.json()["choices"]]
        return joined(answer.text, chat)


Test = Callable[[Served], Awaitable[None]]
Run = Callable[[Test], None]


def plain(choice: dict[str, Any], chat: bool) -> dict[str, Any]:
    text = choice["message"]["content"] if chat else choice["text"]
    return {"text": text, "reason": choice["finish_reason"], "logprobs": rounded(choice["logprobs"])}


def joined(stream: str, chat: bool) -> list[dict[str, Any]]:
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert events[-1] == "[DONE]"
    choices: dict[int, dict[str, Any]] = {}
    for event in map(json.loads, events[:-1]):
        assert "error" not in event
        [part] = event["choices"]
        whole = choices.setdefault(part["index"], {"text": "", "reason": None, "logprobs": None})
        whole["text"] += (part["delta"].get("content") or "") if chat else part["text"]
        whole["reason"] = part["finish_reason"] or whole["reason"]
        for key, values in (rounded(part.get("logprobs")) or {}).items():
            whole["logprobs"] = whole["logprobs"] or {}
            whole["logprobs"].setdefault(key, []).extend(values)
    return [choices[index] for index in sorted(choices)]


def rounded(told: Any) -> Any:
    """Prefilling adds up in another order than decoding."""
    if isinstance(told, float):
        return round(told, 2)
    if isinstance(told, dict):
        return {key: rounded(value) for key, value in told.items()}
    return [rounded(value) for value in told] if isinstance(told, list) else told


@pytest.fixture(scope="module")
def served(request: pytest.FixtureRequest, model: ExpertStore, redis_url: str) -> Iterator[Run]:
    """Gateways that live as long as the module, in a loop of their own; a way to an api for each test."""
    directory = Directory(redis_url, f"loss-{request.param}")
    with asyncio.Runner() as runner:
        exits = AsyncExitStack()
        stop = asyncio.Event()

        async def keep(ready: asyncio.Future[None]) -> None:
            async with exits:
                for number in range(request.param):
                    await exits.enter_async_context(Keeper(order(model, directory, f"g{number}"), limit_s=10))
                ready.set_result(None)
                await stop.wait()

        async def start() -> asyncio.Task[None]:
            ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(keep(ready))
            await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
            ready.result()
            return task

        task = runner.run(start())

        def run(test: Test) -> None:
            async def whole() -> None:
                pool = DeadlyPool(directory, model.manifest.fingerprint)
                async with pool:
                    app = create_app(ApiConfig(store=model.path, model_name="tiny"), pool, no_status)
                    transport = httpx.ASGITransport(app)
                    async with httpx.AsyncClient(transport=transport, base_url="http://api") as http:
                        await test(Served(pool, http))

            runner.run(whole())

        yield run

        async def end() -> None:
            stop.set()
            await task

        runner.run(end())


async def no_status() -> dict[str, object]:
    return {}


CASES = [
    *((1, name, True) for name in REQUESTS),
    *((1, name, False) for name in ("seeded", "several", "logprobs", "grammar")),
    *((2, name, True) for name in ("seeded", "several", "grammar")),
]


@pytest.mark.parametrize(
    ("served", "name", "stream"),
    CASES,
    indirect=["served"],
    scope="module",
    ids=[f"{gateways}-{name}-{'streamed' if stream else 'whole'}" for gateways, name, stream in CASES],
)
def test_an_answer_goes_on_where_it_was_when_its_gateway_is_killed(served: Run, name: str, stream: bool) -> None:
    async def test(service: Served) -> None:
        asked = {**REQUESTS[name], "stream": stream}
        expected = await service.ask(asked)
        assert await service.ask(asked, kill_after=(4, 13)) == expected
        assert len(service.pool.killed) == 2

    served(test)


@pytest.mark.parametrize("served", [1, 2], indirect=True, scope="module")
def test_many_streams_at_once_lose_their_gateways_again_and_again(served: Run) -> None:
    async def test(service: Served) -> None:
        wishes = [{"temperature": 0.9, "seed": seed, "stream": True, "max_tokens": 60} for seed in range(8)]
        expected = [await service.ask(each) for each in wishes]
        asking = [asyncio.create_task(service.ask(each, kill_after=(100, 200, 300))) for each in wishes]
        assert await asyncio.gather(*asking) == expected
        assert len(service.pool.killed) == 3

    served(test)


class TestKeeper:
    async def test_it_ends_with_everything_it_started(self, model: ExpertStore, redis_url: str) -> None:
        directory, others = Directory(redis_url, "ending"), psutil.Process().children(recursive=True)
        async with Keeper(order(model, directory, "g"), limit_s=10):
            [entry] = directory.gateways()
            mine = [child for child in psutil.Process().children(recursive=True) if child not in others]
            assert entry.pid in [child.pid for child in mine]
        assert directory.gateways() == []
        _, alive = psutil.wait_procs(mine, timeout=5)
        assert alive == []

    async def test_when_the_nursery_dies_its_gateway_does_and_both_come_back(
        self, model: ExpertStore, redis_url: str
    ) -> None:
        directory = Directory(redis_url, "nursery")
        async with Keeper(order(model, directory, "g"), limit_s=10) as keeper:
            [entry] = directory.gateways()
            parent = psutil.Process(entry.pid).parent()
            assert parent is not None
            parent.kill()
            while not any(other.pid != entry.pid for other in directory.gateways()):
                assert not keeper.failed.is_set()
                await asyncio.sleep(0.05)

    async def test_what_can_not_be_served_is_said(self, redis_url: str, tmp_path: Path, model: ExpertStore) -> None:
        wrong = order(model, Directory(redis_url, "wrong"), "g")
        with pytest.raises(GatewayFailedError, match=str(tmp_path)):
            async with Keeper(msgspec.structs.replace(wrong, store=str(tmp_path)), limit_s=1):
                pass
