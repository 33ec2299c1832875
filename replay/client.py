"""One request to an OpenAI-compatible server, streamed, with every token's time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from replay.connection import Answer, Connections, HungUpError
from replay.outcome import Outcome
from replay.sse import Event, EventReader, StreamError

_RETRIED = frozenset({408, 409, 429, 500, 502, 503, 504})
_LONGEST_WAIT_S = 60.0
_FIRST_WAIT_S = 0.5
_MESSAGE = 300
_ROUND = 6
_LONGEST_REFUSAL = 1 << 14


class _Refused(Exception):  # noqa: N818  # an answer, not an error of ours
    def __init__(self, message: str, wait_s: float | None, again: bool) -> None:
        super().__init__(message)
        self.wait_s = wait_s
        self.again = again


@dataclass(frozen=True)
class Client:
    """Sends completions over `connections`; none waits for another."""

    connections: Connections
    retries: int = 0
    """How often a request that was refused or not answered at all is sent again, while no token has come"""
    timeout_s: float = 600.0
    """For the whole of a request, retries and all"""

    async def send(self, body: bytes, outcome: Outcome, began: float) -> None:
        """Send a request and write into `outcome` what comes of it; never raises but when cancelled.

        `began` is when the replay did, on the monotonic clock.
        """
        sent = time.monotonic()  # the loop's own clock may only know milliseconds
        outcome.sent_s = round(sent - began, _ROUND)
        outcome.late_s = round(sent - began - outcome.due_s, _ROUND)
        try:
            async with asyncio.timeout(self.timeout_s):
                await self._until_answered(body, outcome, sent)
        except TimeoutError:
            outcome.error = f"timeout: nothing more after {self.timeout_s:g} s and {outcome.tokens} tokens"
        except asyncio.CancelledError:
            outcome.error = f"abandoned: the replay ended after {outcome.tokens} of its tokens"
            raise
        finally:
            outcome.end_s = round(time.monotonic() - sent, _ROUND)

    async def _until_answered(self, body: bytes, outcome: Outcome, sent: float) -> None:
        while True:
            outcome.error, again, wait_s = await self._attempt(body, outcome, sent)
            if not (again and outcome.retries < self.retries and not outcome.token_s):
                return
            await asyncio.sleep(min(wait_s or _FIRST_WAIT_S * 2**outcome.retries, _LONGEST_WAIT_S))
            outcome.retries += 1

    async def _attempt(self, body: bytes, outcome: Outcome, sent: float) -> tuple[str | None, bool, float | None]:
        """(what went wrong, whether it may go better another time, how long the server wants us to wait)."""
        try:
            await self._stream(body, outcome, sent)
        except _Refused as refused:
            return str(refused), refused.again, refused.wait_s
        except StreamError as error:
            return f"malformed stream: {error}", False, None
        except HungUpError:
            return f"hung up: after {outcome.tokens} tokens", True, None
        except OSError as error:
            return f"no connection: {error}", True, None
        return None, False, None

    async def _stream(self, body: bytes, outcome: Outcome, sent: float) -> None:
        reader, refusal = EventReader(), bytearray()

        def take(answer: Answer, data: bytes) -> None:
            outcome.status = answer.status
            if answer.status != 200:
                refusal.extend(data[: _LONGEST_REFUSAL - len(refusal)])
                return
            seconds = round(answer.at - sent, _ROUND)
            for event in reader.feed(data):
                _take(event, outcome, seconds)

        headers = {"x-request-id": outcome.request_id}
        answer = await self.connections.post("/v1/completions", body, headers, take)
        outcome.status = answer.status
        if answer.status != 200:
            raise _refusal(answer, bytes(refusal))
        if not reader.done:
            raise StreamError(f"it ended without [DONE] after {outcome.tokens} tokens")


def _take(event: Event, outcome: Outcome, seconds: float) -> None:
    """Note what an event brought."""
    if event.error is not None:
        raise _Refused(f"error event: {event.error.message}"[:_MESSAGE], None, False)
    came = 0
    for choice in event.choices:
        came += bool(choice.text)
        outcome.finish_reason = choice.finish_reason or outcome.finish_reason
    if event.usage is not None:
        outcome.prompt_tokens_told = event.usage.prompt_tokens
        counted = event.usage.completion_tokens
        if event.choices:  # usage of the stream so far
            came = counted - outcome.tokens
        outcome.tokens = counted
    else:
        outcome.tokens += came
    if came > 0:
        outcome.first_token_s = seconds if outcome.first_token_s is None else outcome.first_token_s
        outcome.token_s += [seconds] * came


def _refusal(answer: Answer, body: bytes) -> _Refused:
    try:
        told = msgspec.json.decode(body, type=dict[str, Any])
        error = told.get("error", told)
        message = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except msgspec.MsgspecError:
        message = body.decode("utf-8", errors="replace")
    try:
        wait_s = float(answer.headers.get("retry-after", ""))
    except ValueError:
        wait_s = None
    again = answer.status in _RETRIED and answer.headers.get("x-should-retry") != "false"
    return _Refused(f"HTTP {answer.status}: {message[:_MESSAGE]}", wait_s, again)


def go_first() -> None:
    """Ask to be scheduled before others, where that is allowed: a clock that waits for its turn is late."""
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)


def allow_many_files() -> None:
    """Every request that is under way holds a socket."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
