"""An engine without a model: deterministic tokens, one per running sequence and step."""

from __future__ import annotations

import threading
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from gateway.link import GatewayClient, GatewayPool, GatewayServer
from gateway.messages import Delta, GatewayStatus, Logprobs, SamplingParams, Submit

SECRET = b"a secret of the cluster"
MODEL = "0123456789abcdef"

Reply = Callable[[list[int], int], int]
"""(prompt token ids, position) -> the token at that position of the answer."""


def counting(prompt: list[int], position: int) -> int:
    """A reply of which every token tells its prompt and place."""
    return (31 * sum(prompt) + 7 * position) % 1000


class FakeEngine:
    """Keeps to `gateway.link.Engine`. With `paced`, a step waits until the test allows it."""

    def __init__(self, reply: Reply = counting, *, paced: bool = False, vocabulary: int = 1000) -> None:
        self.reply = reply
        self.vocabulary = vocabulary
        self.running: dict[str, tuple[Submit, int]] = {}
        self.submitted: list[Submit] = []
        self.cancelled = 0
        self.finished = 0
        self.fails: Exception | None = None
        self.cached_tokens = 0
        self._permits = threading.Semaphore(0) if paced else None
        self._changed = threading.Condition()

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    def add(self, submit: Submit) -> None:
        if any(token >= self.vocabulary for token in submit.prompt_token_ids):
            raise ValueError("The prompt has a token that is not in the vocabulary.")
        with self._changed:
            self.running[submit.request_id] = (submit, len(submit.emitted))
            self.submitted.append(submit)
            self._changed.notify_all()

    def prepare(self, submit: Submit) -> None:
        """Nothing takes time here."""

    def cancel(self, request_id: str) -> None:
        with self._changed:
            self.cancelled += self.running.pop(request_id, None) is not None
            self._changed.notify_all()

    def step(self) -> list[Delta]:
        if self._permits is not None:
            self._permits.acquire()
        if self.fails is not None:
            raise self.fails
        with self._changed:
            deltas = [self._advance(request_id) for request_id in list(self.running)]
            self._changed.notify_all()
        return deltas

    def allow(self, steps: int) -> None:
        """Let a paced engine take so many more steps."""
        assert self._permits is not None
        self._permits.release(steps)

    def stop_pacing(self) -> None:
        """Let it run freely from now on, the step that waits included."""
        if self._permits is not None:
            permits, self._permits = self._permits, None
            permits.release()

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Block the calling thread until a change of the engine makes `condition` true."""
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), "the engine never got there"

    def status(self, query_id: int) -> GatewayStatus:
        return GatewayStatus(
            query_id=query_id,
            gateway="fake",
            running=len(self.running),
            waiting=0,
            kv_blocks_used=0,
            kv_blocks_total=0,
            expert_calls={},
        )

    def _advance(self, request_id: str) -> Delta:
        submit, position = self.running[request_id]
        token = self.reply(submit.prompt_token_ids, position)
        position += 1
        self.running[request_id] = (submit, position)
        stopped = token in submit.params.stop_token_ids and position > submit.params.min_tokens
        reason = "stop" if stopped else "length" if position == submit.params.max_tokens else None
        if reason:
            del self.running[request_id]
            self.finished += 1
        cached = self.cached_tokens if position == 1 else 0
        params = submit.params
        told = position == 1 and params.prompt_logprobs is not None
        return Delta(
            request_id=request_id,
            token_ids=[token],
            finish_reason=reason,
            stop_token=stopped,
            cached_tokens=cached,
            logprobs=None if params.logprobs is None else scores([token], params.logprobs),
            prompt_logprobs=scores(submit.prompt_token_ids[1:], params.prompt_logprobs or 0) if told else None,
        )


def scores(tokens: list[int], best: int) -> Logprobs:
    """-t/1000 for token ``t``; the likeliest are 10, 11, 12..., at -0.5, -1.5, -2.5..."""
    return Logprobs(
        array("f", [-token / 1000 for token in tokens]).tobytes(),
        array("i", [10 + i for _ in tokens for i in range(best)]).tobytes(),
        array("f", [-0.5 - i for _ in tokens for i in range(best)]).tobytes(),
    )


@asynccontextmanager
async def serve(engine: FakeEngine, tcp_host: str | None = None) -> AsyncIterator[GatewayServer]:
    server = GatewayServer(engine, secret=SECRET, fingerprint=MODEL, status=engine.status, tcp_host=tcp_host)
    async with server:
        try:
            yield server
        finally:
            engine.stop_pacing()


def submit(
    request_id: str = "r", prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 5, **params: int | str
) -> Submit:
    sampling = SamplingParams(max_tokens=max_tokens, **params)  # type: ignore[arg-type]
    return Submit(request_id=request_id, prompt_token_ids=list(prompt), params=sampling)


def expected(prompt: tuple[int, ...], tokens: int) -> list[int]:
    return [counting(list(prompt), position) for position in range(tokens)]


async def tokens_of(source: GatewayClient | GatewayPool, request: Submit) -> list[int]:
    return [token async for delta in source.generate(request) for token in delta.token_ids]
