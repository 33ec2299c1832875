"""Watches the sequences of a request on their way to the client: times and counts for metrics and log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from gateway.api.metrics import Metrics
from gateway.api.request_record import RequestRecord
from gateway.link import GatewayPool
from gateway.messages import Delta, Submit, Timings


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What a request asks of the scheduler."""

    priority: int = 0
    """Lower goes first."""
    deadline_s: float | None = None
    """Seconds from now to its last token."""


class TrackedPool:
    """The gateways as one request sees them (`gateway.api.answer.Source`)."""

    def __init__(self, pool: GatewayPool, record: RequestRecord, metrics: Metrics, demands: Demands) -> None:
        self._pool = pool
        self._demands = demands
        self._record = record
        self._metrics = metrics

    async def generate(self, submit: Submit) -> AsyncGenerator[Delta, None]:
        """The pool's deltas of a sequence."""
        reason: str | None = None
        tokens, first, last = 0, 0.0, 0.0
        try:
            async with aclosing(self._pool.generate(self._demanding(submit))) as deltas:
                async for delta in deltas:
                    if delta.token_ids:
                        now = time.perf_counter()
                        if tokens:
                            self._metrics.inter_token.observe(now - last)
                        else:
                            first = now
                            self._first(now, delta.cached_tokens)
                        last = now
                        tokens += len(delta.token_ids)
                        self._metrics.generation_tokens.inc(len(delta.token_ids))
                    if delta.finish_reason is not None:
                        reason = delta.finish_reason
                        self._timed(delta.timings)
                    yield delta
        except asyncio.CancelledError:
            reason = "abort"
            raise
        except GeneratorExit:
            if reason is None:  # closed before its end: by a stop string, unless the client left
                task = asyncio.current_task()
                reason = "abort" if task is not None and task.cancelling() else "stop"
            raise
        finally:
            self._end(reason or "error", tokens, first, last)

    def _demanding(self, submit: Submit) -> Submit:
        demands = self._demands
        return msgspec.structs.replace(submit, priority=demands.priority, deadline_s=demands.deadline_s)

    def _first(self, now: float, cached_tokens: int) -> None:
        since = now - self._record.started
        self._record.cached_tokens += cached_tokens
        self._metrics.first_token.observe(since)
        if self._record.first_token_s is None:
            self._record.first_token_s = since

    def _timed(self, timings: Timings | None) -> None:
        if timings is None:
            return
        self._metrics.queue_time.observe(timings.queue_s)
        self._metrics.prefill_time.observe(timings.prefill_s)
        self._metrics.decode_time.observe(timings.decode_s)
        record = self._record
        record.queue_s = max(record.queue_s, timings.queue_s)
        record.prefill_s = max(record.prefill_s, timings.prefill_s)
        record.decode_s = max(record.decode_s, timings.decode_s)

    def _end(self, reason: str, tokens: int, first: float, last: float) -> None:
        self._record.completion_tokens += tokens
        self._record.finish_reasons[reason] += 1
        self._metrics.finished(reason)
        if reason in ("stop", "length"):
            self._metrics.end_to_end.observe(time.perf_counter() - self._record.started)
            if tokens > 1:
                self._metrics.per_token.observe((last - first) / (tokens - 1))
