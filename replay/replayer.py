"""The replayer: an open loop. Every request is sent when the trace says so, whatever became of those before it.

Prompts are made ahead of their time, so that a request is ready when it is due. Each is due at an absolute time, so
being late once makes nothing later; how late each was is told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from replay.client import Client
from replay.outcome import Outcome
from replay.prompts import Prompts, fitted
from replay.trace import TraceRequest

_AHEAD = 128  # requests whose prompts are ready
_LEAD_S = 0.5  # before the first one
_AT_ONCE = 32  # sends in a row before answers are read again


@dataclass(frozen=True)
class Asking:
    """How requests are asked."""

    model: str
    longest: int | None = None
    """Tokens that the model's context has: longer requests are shortened"""
    temperature: float = 1.0
    ignore_eos: bool = True
    """Whether answers are to have the trace's length whatever the model says; not every server knows that."""
    seed: int = 0

    def body(self, request: TraceRequest, prompt: list[int] | str) -> bytes:
        """The request's JSON."""
        fields = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max(request.answer_tokens, 1),
            "temperature": self.temperature,
            "seed": (self.seed * 1_000_003 + request.index) % (1 << 31),
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return msgspec.json.encode(fields)


@dataclass
class Progress:
    """Where a replay stands."""

    sent: int = 0
    done: int = 0
    failed: int = 0
    tokens: int = 0
    shortened: int = 0
    """Requests that were longer than the model's context"""

    @property
    def under_way(self) -> int:
        """Sent and not done."""
        return self.sent - self.done


class Replayer:
    """Plays requests to a server, and hands over what became of each one as it ends."""

    def __init__(self, client: Client, prompts: Prompts, asking: Asking, tell: Callable[[Outcome], None]) -> None:
        self.progress = Progress()
        self.began: float | None = None
        """On the monotonic clock"""
        self._client = client
        self._prompts = prompts
        self._asking = asking
        self._tell = tell
        self._under_way: set[asyncio.Task[None]] = set()
        self._sending: asyncio.Task[None] | None = None
        self._stopped = False

    async def run(self, requests: Iterable[TraceRequest]) -> None:
        """Send all `requests`, which are in order of time, and wait for their answers. Once only."""
        ready: asyncio.Queue[tuple[TraceRequest, bytes] | None] = asyncio.Queue(_AHEAD)
        async with asyncio.TaskGroup() as group:
            preparing = group.create_task(self._prepare(requests, ready))
            self._sending = group.create_task(self._send_all(ready))
            self._sending.add_done_callback(lambda _: preparing.cancel())
            if self._stopped:
                self._sending.cancel()
        if self._stopped:
            for task in self._under_way:
                task.cancel()
        while self._under_way:
            await asyncio.wait(self._under_way)

    def stop(self) -> None:
        """Send nothing more, and give up what is under way: `run` returns."""
        self._stopped = True
        if self._sending is not None:
            self._sending.cancel()
        for task in self._under_way:
            task.cancel()

    async def _prepare(
        self, requests: Iterable[TraceRequest], ready: asyncio.Queue[tuple[TraceRequest, bytes] | None]
    ) -> None:
        for request in requests:
            fitting = fitted(request, self._asking.longest)
            self.progress.shortened += fitting is not request
            await ready.put((fitting, self._asking.body(fitting, self._prompts.of(fitting))))
            await asyncio.sleep(0)  # one prompt at a time, so that nothing that is due waits for many
        await ready.put(None)

    async def _send_all(self, ready: asyncio.Queue[tuple[TraceRequest, bytes] | None]) -> None:
        self.began = time.monotonic() + _LEAD_S
        in_a_row = 0
        while (item := await ready.get()) is not None:
            request, body = item
            wait_s = self.began + request.time_s - time.monotonic()
            in_a_row = 0 if wait_s > 0 else in_a_row + 1
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            elif in_a_row % _AT_ONCE == 0:
                await asyncio.sleep(0)
            self._send(request, body)

    def _send(self, request: TraceRequest, body: bytes) -> None:
        outcome = Outcome(
            index=request.index, request_id=f"replay-{self._asking.seed}-{request.index}",
            due_s=round(request.time_s, 6),
            prompt_tokens=max(request.prompt_tokens, 1), answer_tokens=max(request.answer_tokens, 1), kind=request.kind,
        )  # fmt: skip
        self.progress.sent += 1
        task = asyncio.create_task(self._client.send(body, outcome, self.began or 0.0))
        self._under_way.add(task)
        task.add_done_callback(lambda task: self._ended(task, outcome))

    def _ended(self, task: asyncio.Task[None], outcome: Outcome) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
        if outcome.sent_s is None:
            self.progress.sent -= 1  # given up before it was on its way
            return
        self.progress.done += 1
        self.progress.failed += outcome.error is not None
        self.progress.tokens += outcome.tokens
        self._tell(outcome)
