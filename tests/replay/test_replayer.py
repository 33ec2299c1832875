"""The replayer: an open loop on the trace's clock, whatever the server does; every failure is told, none hangs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from replay.client import Client
from replay.connection import Connections
from replay.outcome import Outcome
from replay.prompts import Prompts
from replay.replayer import Asking, Replayer
from replay.trace import TraceRequest
from tests.replay.completion_server import DONE, Answer, CompletionServer, chunk, serving, stream, tokens, usage

PROMPTS = Prompts({"code": np.arange(1000, dtype=np.int32)})


def trace(count: int, gap_s: float = 0.0, answer: int = 3) -> list[TraceRequest]:
    return [TraceRequest(n, n * gap_s, 20 + n, answer) for n in range(count)]


def play(
    server: CompletionServer,
    requests: list[TraceRequest],
    *,
    during: Callable[[Replayer], Any] | None = None,
    asking: Asking | None = None,
    **options: Any,
) -> list[Outcome]:
    """What becomes of `requests`, in order of their numbers."""
    outcomes: list[Outcome] = []

    async def run() -> None:
        async with serving(server), asyncio.timeout(30):
            connections = Connections(options.pop("url", server.url))
            client = Client(connections, **options)
            replayer = Replayer(client, PROMPTS, asking or Asking("any"), outcomes.append)
            beside = asyncio.create_task(during(replayer)) if during else None
            await replayer.run(requests)
            assert replayer.progress.done == replayer.progress.sent == len(outcomes)
            if beside:
                await beside
            connections.close()

    asyncio.run(run())
    return sorted(outcomes, key=lambda outcome: outcome.index)


def answering(parts: list[bytes], gap_s: float = 0.0) -> Answer:
    async def answer(server: CompletionServer, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await stream(request, parts, gap_s)

    return answer


def test_every_request_is_sent_and_its_tokens_timed() -> None:
    outcomes = play(CompletionServer(tokens(4, gap_s=0.02)), trace(10))
    for outcome in outcomes:
        assert (outcome.status, outcome.error, outcome.tokens, outcome.retries) == (200, None, 4, 0)
        assert outcome.prompt_tokens_told == 7
        assert len(outcome.token_s) == 4
        assert outcome.token_s == sorted(outcome.token_s)
        assert outcome.first_token_s == outcome.token_s[0] >= 0.015
        assert outcome.end_s is not None
        assert outcome.end_s >= outcome.token_s[-1] >= 0.07


def test_requests_are_sent_when_the_trace_says_so() -> None:
    server = CompletionServer(tokens(1))
    outcomes = play(server, trace(40, gap_s=0.01))
    due = np.array([outcome.due_s for outcome in outcomes])
    reached = np.array(server.arrivals)
    assert np.median(np.abs((reached - reached[0]) - (due - due[0]))) < 0.02
    for outcome in outcomes:
        assert outcome.sent_s is not None
        assert outcome.late_s is not None
        assert outcome.late_s >= -0.002
        assert outcome.late_s == pytest.approx(outcome.sent_s - outcome.due_s, abs=1e-5)


def test_a_slow_server_changes_nothing_about_when_requests_are_sent() -> None:
    """An open loop: all thirty are under way before the first one is answered."""
    server = CompletionServer()
    everybody = asyncio.Event()

    async def when_all_are_there(server: CompletionServer, request: web.Request, body: Any) -> web.StreamResponse:
        if len(server.arrivals) == 30:
            everybody.set()
        await everybody.wait()
        return await tokens(1)(server, request, body)

    server.answer = when_all_are_there
    outcomes = play(server, trace(30, gap_s=0.005))
    assert all(outcome.error is None for outcome in outcomes)


def test_being_late_once_makes_nothing_later() -> None:
    """A pause of the whole process delays what was due in it, and nothing after it."""

    async def stall(replayer: Replayer) -> None:
        await asyncio.sleep(0.6)  # a tenth of a second after the first request
        time.sleep(0.2)

    outcomes = play(CompletionServer(tokens(1)), trace(100, gap_s=0.01), during=stall)
    late = np.array([outcome.late_s for outcome in outcomes], float)
    assert late.max() > 0.1
    assert np.median(late[-30:]) < 0.02


@pytest.mark.parametrize(
    ("answer", "error", "came"),
    [
        (answering([chunk(" a"), chunk(" b")]), "malformed stream: it ended without [DONE] after 2 tokens", 2),
        (answering([chunk(" a"), b"data: {oops\n\n", DONE]), "malformed stream: an event that is none", 1),
        (answering([b"<html>no stream</html>"]), "malformed stream: it ended without [DONE]", 0),
        (answering([b"data: 7\n\n", DONE]), "malformed stream: an event that is none", 0),
        (answering([chunk(" a"), b'data: {"error": {"message": "broken"}}\n\n', DONE]), "error event: broken", 1),
    ],
)
def test_streams_that_are_none(answer: Answer, error: str, came: int) -> None:
    [outcome] = play(CompletionServer(answer), trace(1))
    assert outcome.error is not None
    assert outcome.error.startswith(error)
    assert len(outcome.token_s) == came


def test_a_server_that_hangs_up() -> None:
    async def hang_up(server: CompletionServer, request: web.Request, body: Any) -> web.StreamResponse:
        response = await stream(request, [chunk(" a")])
        await asyncio.sleep(0.05)
        assert request.transport is not None
        request.transport.abort()
        return response

    [outcome] = play(CompletionServer(hang_up), trace(1))
    assert outcome.error is not None
    assert outcome.error.startswith("hung up: after 1 tokens")


def test_a_server_that_says_nothing() -> None:
    [outcome] = play(CompletionServer(tokens(3, gap_s=60)), trace(1), timeout_s=0.3)
    assert outcome.error is not None
    assert outcome.error.startswith("timeout: ")
    assert outcome.end_s == pytest.approx(0.3, abs=0.2)


def test_nobody_listens(free_port: int) -> None:
    outcomes = play(CompletionServer(), trace(3), url=f"http://127.0.0.1:{free_port}")
    assert [outcome.error_kind for outcome in outcomes] == ["no connection"] * 3


def refusing(status: int, times: int, headers: dict[str, str] | None = None) -> Answer:
    async def answer(server: CompletionServer, request: web.Request, body: Any) -> web.StreamResponse:
        if len(server.arrivals) <= times:
            error = {"error": {"message": "not now", "type": "t", "param": None, "code": None}}
            return web.json_response(error, status=status, headers=headers)
        return await tokens(2)(server, request, body)

    return answer


def test_refusals_are_told_and_not_repeated_unless_asked_for() -> None:
    server = CompletionServer(refusing(429, 10))
    [outcome] = play(server, trace(1))
    assert (outcome.status, outcome.error, outcome.retries) == (429, "HTTP 429: not now", 0)
    assert len(server.arrivals) == 1


def test_retries_obey_retry_after() -> None:
    server = CompletionServer(refusing(503, 2, {"Retry-After": "0.2"}))
    [outcome] = play(server, trace(1), retries=3)
    assert (outcome.status, outcome.error, outcome.retries, outcome.tokens) == (200, None, 2, 2)
    assert np.diff(server.arrivals).min() >= 0.19
    assert outcome.first_token_s is not None
    assert outcome.first_token_s > 0.39, "the time to the first token counts from the first try"


@pytest.mark.parametrize(("status", "headers"), [(400, {}), (504, {"x-should-retry": "false"})])
def test_what_will_never_work_is_not_repeated(status: int, headers: dict[str, str]) -> None:
    server = CompletionServer(refusing(status, 10, headers))
    [outcome] = play(server, trace(1), retries=3)
    assert (outcome.status, outcome.retries, len(server.arrivals)) == (status, 0, 1)


def test_several_tokens_at_once_and_in_pieces() -> None:
    """Usage tells how many tokens an event brought; where events begin and end in the bytes does not matter."""
    whole = b": comment\r\n\r\n" + chunk(" a b", usage=2) + chunk("", usage=2) + chunk(" c", "length", usage=3)
    whole += usage(3) + DONE
    parts = [whole[at : at + 9] for at in range(0, len(whole), 9)]
    [outcome] = play(CompletionServer(answering(parts)), trace(1))
    assert (outcome.error, outcome.tokens, len(outcome.token_s), outcome.finish_reason) == (None, 3, 3, "length")
    assert outcome.token_s[0] == outcome.token_s[1]


def test_without_usage_events_with_text_are_counted() -> None:
    [outcome] = play(CompletionServer(answering([chunk(" a"), chunk(" b"), chunk("", "stop"), DONE])), trace(1))
    assert (outcome.tokens, outcome.finish_reason) == (2, "stop")


def test_stopping_gives_what_was_done_so_far() -> None:
    async def stop(replayer: Replayer) -> None:
        while replayer.progress.done < 3:
            await asyncio.sleep(0.01)
        replayer.stop()

    async def first_three(server: CompletionServer, request: web.Request, body: Any) -> web.StreamResponse:
        return await tokens(2, 0.0 if len(server.arrivals) <= 3 else 60.0)(server, request, body)

    outcomes = play(CompletionServer(first_three), trace(1000, gap_s=0.02), during=stop)
    assert 3 <= len(outcomes) < 500
    assert [outcome.error for outcome in outcomes[:3]] == [None] * 3
    assert all((outcome.error_kind or "abandoned") == "abandoned" for outcome in outcomes)


def test_the_same_seed_sends_the_same_requests() -> None:
    def sent(seed: int) -> list[str]:
        server = CompletionServer()
        play(server, trace(5), asking=Asking("any", seed=seed))
        return sorted(json.dumps(body) for body in server.bodies)

    assert sent(1) == sent(1)
    assert sent(1) != sent(2)


def test_what_a_request_asks_for() -> None:
    server = CompletionServer()
    play(server, [TraceRequest(0, 0.0, 20, 5)], asking=Asking("any", temperature=0.5))
    [body] = server.bodies
    assert len(body["prompt"]) == 20
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("any", 5, 0.5)
    assert (body["stream"], body["ignore_eos"]) == (True, True)
    assert body["stream_options"]["include_usage"]


def test_requests_beyond_the_context_are_shortened_and_counted() -> None:
    server = CompletionServer()

    async def look(replayer: Replayer) -> None:
        while replayer.progress.done < 2:
            await asyncio.sleep(0.01)
        assert replayer.progress.shortened == 1

    requests = [TraceRequest(0, 0.0, 90, 10), TraceRequest(1, 0.0, 500, 80)]
    play(server, requests, asking=Asking("any", longest=100), during=look)
    assert sorted((len(body["prompt"]), body["max_tokens"]) for body in server.bodies) == [(50, 50), (90, 10)]
