"""An api process for tests: a tiny tokenizer, a fake engine behind a real gateway server, and ways to talk to it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gateway.api.app import create_app
from gateway.api.limits import Limits
from gateway.api.listener import listening
from gateway.api.served_model import ApiConfig
from gateway.link import GatewayPool
from placement.policy import ApiPolicy
from tests.gateway.fake_engine import MODEL, SECRET, FakeEngine, Reply, serve

NAME = "tiny/model"
CONTEXT = 64
TEXT = "def add(a, b):\n    return a + b  # naïve 🙂 日本語 done"
"""What the fake model says: characters of one to four bytes, which byte-level tokens cut apart."""
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'tool' %}{{ raise_exception('no tool turns here') }}{% endif -%}
<|start|>{{ message.role }}
{{ message.content }}<|end|>
{% endfor -%}
{%- if add_generation_prompt %}<|start|>assistant
{% endif -%}
"""
END = "<|end|>"


def make_store(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """The files of a store that an api process reads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|start|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def add(a, b):\n    return a + b", "user assistant system done"], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    files: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": {"eos_token": END},
        "config.json": {"max_position_embeddings": CONTEXT, "vocab_size": tokenizer.get_vocab_size()},
        "generation_config.json": {"eos_token_id": tokenizer.token_to_id(END)},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def tokenizer_of(store: Path) -> Tokenizer:
    return Tokenizer.from_file(str(store / "tokenizer.json"))


def saying(store: Path, text: str) -> Reply:
    """A model that answers `text` and ends."""
    tokenizer = tokenizer_of(store)
    end = tokenizer.token_to_id(END)
    ids = tokenizer.encode(text).ids
    return lambda prompt, position: int(ids[position]) if position < len(ids) else int(end or 0)


@dataclass
class Api:
    """An api in this process, and what is behind it."""

    app: FastAPI
    engine: FakeEngine
    http: httpx.AsyncClient
    pool: GatewayPool

    async def post(self, path: str, **body: Any) -> httpx.Response:
        content = json.dumps(body).encode()  # in ASCII: half a surrogate pair travels as an escape
        return await self.http.post(path, content=content, headers={"content-type": "application/json"})

    async def completion(self, **body: Any) -> httpx.Response:
        return await self.post("/v1/completions", **{"model": NAME, "prompt": "def", "max_tokens": 60, **body})

    async def chat(self, content: Any = "hi", **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return await self.post("/v1/chat/completions", **{"model": NAME, "messages": messages, **body})


async def until_running(engine: FakeEngine, count: int) -> None:
    """Let a paced engine step until it runs so many sequences: it takes new ones only between steps."""
    while len(engine.running) < count:
        engine.allow(1)
        await asyncio.sleep(0.01)


@asynccontextmanager
async def served(
    store: Path, engine: FakeEngine, limits: Limits | None = None, **config: Any
) -> AsyncIterator[tuple[FastAPI, GatewayPool]]:
    """The application with `engine` behind a gateway server on a real socket."""
    async with serve(engine) as gateway:

        async def addresses() -> list[str]:
            return gateway.addresses

        async def status() -> dict[str, Any]:
            answers = await pool.status()
            calls = {"inline": 3, "replica": 4}
            replica = {"draining": False, "resident_bytes": 4096, "misses": 2, "device": "emulated (9 rows/s, 1 ms)"}
            unit = {"unit": "expert-0", "planned": 2, "ready": 1, "replicas": [replica], "calls": calls}
            return {"model": NAME, "units": [unit], "gateways": [msgspec.to_builtins(answer) for answer in answers]}

        async with GatewayPool(addresses, SECRET, MODEL, patience_s=0.2) as pool:
            yield create_app(ApiConfig(store=store, model_name=NAME, **config), pool, status, limits), pool


@asynccontextmanager
async def api_of(store: Path, engine: FakeEngine | None = None, **config: Any) -> AsyncIterator[Api]:
    engine = engine or FakeEngine(saying(store, TEXT))
    async with served(store, engine, **config) as (app, pool):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as http:
            yield Api(app, engine, http, pool)


@contextmanager
def http_server(store: Path, engine: FakeEngine, **config: Any) -> Iterator[str]:
    """The URL of the application on a port of its own, in a thread of its own; it ends as it does under Serve."""
    config.setdefault("policy", ApiPolicy(drain_s=1))
    stop = asyncio.Event()
    started: Future[tuple[asyncio.AbstractEventLoop, int]] = Future()

    async def main() -> None:
        async with (
            served(store, engine, **config) as (app, _),
            listening(app, "127.0.0.1", 0) as port,
            app.router.lifespan_context(app),
        ):
            started.set_result((asyncio.get_running_loop(), port))
            await stop.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    loop, port = started.result(20)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        engine.stop_pacing()
        loop.call_soon_threadsafe(stop.set)
        thread.join()


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON of a stream's events, after checking that it ends as a stream must."""
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, after checking that it is an OpenAI error and nothing else."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    assert response.headers["x-request-id"]
    return dict(body["error"])
