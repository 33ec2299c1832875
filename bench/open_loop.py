"""Requests sent when they are due, whatever became of those before: what users do, and what queues grow from."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
import numpy as np

from replay.traffic import Request


@dataclass
class Answer:
    """What became of a request; seconds on the clock of its run."""

    due_s: float
    sent_s: float = 0.0
    token_s: list[float] = field(default_factory=list)
    """When each chunk of text came."""
    text: str = ""
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Due to first text."""
        return self.token_s[0] - self.due_s

    @property
    def gaps_s(self) -> list[float]:
        """Between chunks."""
        return np.diff(self.token_s).tolist()

    @property
    def tpot_s(self) -> float | None:
        """Mean gap; None of fewer than two chunks."""
        return None if len(self.token_s) < 2 else (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)


def run(url: str, model: str, requests: Sequence[Request]) -> list[Answer]:
    """Send `requests` at their times, and wait for all answers."""
    return asyncio.run(_run(url, model, requests))


async def _run(url: str, model: str, requests: Sequence[Request]) -> list[Answer]:
    answers = [Answer(due_s=request.time_s) for request in requests]
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for request, answer in zip(requests, answers, strict=True):
                await asyncio.sleep(started + request.time_s - time.perf_counter())
                tasks.create_task(_ask(client, model, request, answer, started))
    return answers


async def _ask(client: httpx.AsyncClient, model: str, request: Request, answer: Answer, started: float) -> None:
    body = {
        "model": model, "prompt": request.prompt.tolist(), "max_tokens": request.answer_tokens, "ignore_eos": True,
        "temperature": 0, "stream": True,
    }  # fmt: skip
    answer.sent_s = time.perf_counter() - started
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    answer.error = chunk["error"]["message"]
                else:
                    answer.token_s.append(time.perf_counter() - started)
                    answer.text += chunk["choices"][0]["text"]
            if response.status_code != 200:
                answer.error = answer.error or f"status {response.status_code}"
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
