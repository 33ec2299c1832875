"""From a job to its answer: runs the sequences and gives their pieces to a format."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from pydantic import BaseModel

from gateway.api import errors
from gateway.api.errors import ApiError
from gateway.api.event_stream import DONE, event
from gateway.api.job import Job
from gateway.api.responses import PromptTokensDetails, Usage
from gateway.api.text import Piece, ScoredToken
from gateway.link import GatewayLostError
from gateway.messages import Delta, Submit

log = logging.getLogger(__name__)


class Source(Protocol):
    """Where sequences run: a `GatewayPool`, or a view of one."""

    def generate(self, submit: Submit) -> AsyncGenerator[Delta, None]:
        """The sequence's deltas; raise GatewayLostError."""


class Format(Protocol):
    """How one endpoint writes its answers (`gateway.api.formats`)."""

    def chunk(self, choice: int, piece: Piece, usage: Usage | None) -> bytes:
        """A stream's chunk with the next piece of a choice."""

    def last_chunk(self, usage: Usage) -> bytes:
        """The chunk without choices that ends a stream with its usage."""

    def whole(self, texts: list[str], reasons: list[str], scored: list[list[ScoredToken]], usage: Usage) -> BaseModel:
        """The answer in one."""


async def collect(job: Job, pool: Source, form: Format) -> BaseModel:
    """The whole answer; raise ApiError."""
    texts, reasons = [""] * job.choices, [""] * job.choices
    tokens, cached = [0] * job.choices, [0] * job.choices
    scored: list[list[ScoredToken]] = [[] for _ in range(job.choices)]
    async with aclosing(_pieces(job, pool)) as pieces:
        async for choice, piece in pieces:
            texts[choice] += piece.text
            reasons[choice] = piece.finish_reason or ""
            tokens[choice], cached[choice] = piece.tokens, piece.cached_tokens
            scored[choice] += piece.scored
    return form.whole(texts, reasons, scored, _usage(job, tokens, cached))


async def events(job: Job, pool: Source, form: Format) -> AsyncGenerator[bytes, None]:
    """The answer as server-sent events.

    Raise ApiError only before the first; later an error is an event of its own, and the stream still ends as it must.
    """
    tokens, cached = [0] * job.choices, [0] * job.choices
    begun = False
    try:
        async with aclosing(_pieces(job, pool)) as pieces:
            async for choice, piece in pieces:
                tokens[choice], cached[choice] = piece.tokens, piece.cached_tokens
                usage = _usage(job, tokens, cached) if job.continuous_usage else None
                yield event(form.chunk(choice, piece, usage))
                begun = True
        if job.include_usage:
            yield event(form.last_chunk(_usage(job, tokens, cached)))
    except ApiError as error:
        if not begun:
            raise
        yield event(error.body())
    except Exception as error:
        if not begun:
            raise
        log.error("the stream of %s broke: %s", job.id, errors.trace(error))
        yield event(errors.internal().body())
    yield DONE


def _usage(job: Job, tokens: list[int], cached: list[int]) -> Usage:
    """Of what each choice has so far; a prompt counts once, and as cached what the first of its answers found."""
    prompt, answers = job.prompt_tokens, sum(tokens)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=answers,
        total_tokens=prompt + answers,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(cached[:: job.n])),
    )


def _pieces(job: Job, pool: Source) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of all choices as they come."""
    return _sequence(job, pool, 0) if job.choices == 1 else _merged(job, pool)


async def _sequence(job: Job, pool: Source, choice: int) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of one choice, the last with a finish reason; raise ApiError."""
    text = job.text(choice)
    try:
        async with aclosing(pool.generate(job.submit(choice))) as deltas:
            async for delta in deltas:
                if delta.finish_reason == "error":
                    raise errors.from_gateway(delta.error_status, delta.error, delta.retry_after_s)
                piece = text.push(delta)
                if piece.text or piece.finish_reason or piece.scored:
                    yield choice, piece
                if piece.finish_reason:
                    return
    except GatewayLostError as error:
        log.warning("%s was given up: %s", job.id, error)
        raise errors.unavailable() from error


async def _merged(job: Job, pool: Source) -> AsyncGenerator[tuple[int, Piece], None]:
    """Every choice in a task of its own; the first error ends them all."""
    queue: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

    async def run(choice: int) -> None:
        try:
            async with aclosing(_sequence(job, pool, choice)) as pieces:
                async for item in pieces:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(run(choice)) for choice in range(job.choices)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
