"""A server in the test's own event loop, that answers as the test wants it to: also slowly, wrongly or not at all."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Answer = Callable[["CompletionServer", web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


def chunk(text: str = "", finish: str | None = None, usage: int | None = None) -> bytes:
    """An event as OpenAI sends it; `usage`: tokens so far."""
    event: dict[str, Any] = {"id": "x", "choices": [{"index": 0, "text": text, "finish_reason": finish}]}
    if usage is not None:
        event["usage"] = {"prompt_tokens": 7, "completion_tokens": usage}
    return f"data: {json.dumps(event)}\n\n".encode()


def usage(tokens: int) -> bytes:
    """The last event before the end."""
    told = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}}
    return f"data: {json.dumps(told)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


async def stream(request: web.Request, parts: list[bytes], gap_s: float = 0.0) -> web.StreamResponse:
    """Answer with `parts`, and a pause before each."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for part in parts:
        await asyncio.sleep(gap_s)
        await response.write(part)
    return response


def tokens(count: int, gap_s: float = 0.0) -> Answer:
    """Answers of `count` tokens."""

    async def answer(server: CompletionServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        parts = [chunk(" word", usage=n + 1) for n in range(count)]
        return await stream(request, [*parts, usage(count), DONE], gap_s)

    return answer


async def as_asked(server: CompletionServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """As many tokens as are asked for."""
    return await tokens(body["max_tokens"])(server, request, body)


@dataclass
class CompletionServer:
    """What was asked, and where."""

    answer: Answer = as_asked
    tokenizes: bool = True
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "any", "max_model_len": 4096}])
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Of completions; what is sent to try the server out is not among them"""
    arrivals: list[float] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self.models})

    async def _tokenize(self, request: web.Request) -> web.Response:
        if not self.tokenizes:
            return web.Response(status=404, text="no such place")
        body = await request.json()
        return web.json_response({"tokens": [ord(c) for c in body["prompt"]], "count": len(body["prompt"])})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        self.keys.add(request.headers.get("Authorization"))
        body = await request.json()
        if request.headers["x-request-id"] == "replay-try":
            return await as_asked(self, request, body)
        self.arrivals.append(time.monotonic())
        self.bodies.append(body)
        return await self.answer(self, request, body)


@asynccontextmanager
async def serving(server: CompletionServer) -> AsyncIterator[CompletionServer]:
    """`server`, listening."""
    app = web.Application(client_max_size=1 << 26)
    app.add_routes([
        web.get("/v1/models", server._models),
        web.post("/tokenize", server._tokenize),
        web.post("/v1/completions", server._completions),
    ])  # fmt: skip
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield server
    finally:
        await runner.cleanup()
