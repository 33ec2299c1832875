"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gateway.batch import Batch, build_batch
from gateway.blocks import BlockPool
from gateway.grammar import Grammars, GrammarState
from gateway.kv_cache import KVCache, blocks_in
from gateway.messages import Delta, Logprobs, Submit
from gateway.model import GatewayModel
from gateway.pace import Pace
from gateway.request_check import RequestError as RequestError
from gateway.request_check import capped, check
from gateway.routing_log import RoutingLog
from gateway.sampler import INVALID, sample, tell
from gateway.scheduler import Scheduler, Work
from gateway.sequence import Sequence
from gateway.step_times import StepTimes

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How much the engine holds and does at a time."""

    kv_cache_gib: float = 1.0
    """Memory for keys and values, in GiB; it is touched only as far as it is used."""
    block_size: int = 16
    """Tokens per cache block."""
    token_budget: int = 512
    """Tokens a step computes at most: decoding sequences take one each, chunks of prompts the rest."""
    max_sequences: int = 64
    """Sequences that run at once; more wait."""
    max_waiting: int = 1024
    """Sequences that wait at most; more are refused."""
    prefix_caching: bool = True
    """Whether sequences start behind what others have left in the cache."""


class Engine:
    """Runs any number of requests on one model. Not thread-safe: one owner adds, cancels and steps."""

    def __init__(
        self,
        model: GatewayModel,
        settings: EngineSettings | None = None,
        *,
        grammars: Grammars | None = None,
        draw_seed: Callable[[], int] = lambda: secrets.randbits(63),
        clock: Callable[[], float] = time.monotonic,
        times: StepTimes | None = None,
        routing: RoutingLog | None = None,
    ) -> None:
        """Raise ValueError for settings that cannot work.

        `draw_seed` gives the seed of requests without one, `clock` the seconds by which deadlines and timings go.
        `routing` notes what the model's layers route; it must be watching the model's experts.
        """
        settings = settings or EngineSettings()
        blocks = blocks_in(settings.kv_cache_gib, model.kv_shapes, model.dtype, settings.block_size)
        self.model = model
        self.cache = KVCache(
            model.kv_shapes, blocks=blocks, block_size=settings.block_size, dtype=model.dtype, device=model.device
        )
        self.pool = BlockPool(blocks, settings.block_size, self.cache.clear)
        self.scheduler = Scheduler(
            self.pool,
            token_budget=settings.token_budget,
            max_sequences=settings.max_sequences,
            max_waiting=settings.max_waiting,
            # Where a key depends on the length of its whole sequence, equal tokens do not make equal blocks.
            prefix_caching=settings.prefix_caching and model.rope is None,
        )
        self.times = times or StepTimes()
        self._routing = routing
        self._pace = Pace()
        self._grammars = grammars
        self._draw_seed = draw_seed
        self._clock = clock
        self._sequences: dict[str, Sequence] = {}
        self._finished: list[Delta] = []

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._finished) or self.scheduler.has_work

    @property
    def running(self) -> int:
        """Sequences that hold a place in the batch."""
        return len(self.scheduler.running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for one."""
        return len(self.scheduler.waiting)

    def step(self) -> list[Delta]:
        """Compute one batch: what it added to each sequence. A failure ends the sequences it hit, no others."""
        started = time.perf_counter()
        deltas = self._without_a_step()
        works = self.scheduler.schedule(self._clock())
        if not works:
            return deltas
        try:
            batch = build_batch(works, self.cache, rope=self.model.rope, device=self.model.device)
            if self._routing is not None:
                self._routing.begin(batch)
            scheduled = time.perf_counter()
            logits = self.model.forward(batch)
            computed = time.perf_counter()
            tokens = sample(logits[: len(batch.sampled)], batch.sampled)
            told = tell(logits, batch.sampled, tokens)
            _score_prompts(logits, batch)
        except Exception as failure:
            return deltas + self._fail(works, failure)
        self.scheduler.advance(works, _damaged(logits, batch.sampled, tokens))
        sampled = time.perf_counter()
        chosen = zip(batch.sampled, tokens, strict=True)
        deltas += [self._emit(sequence, token, told.get(i)) for i, (sequence, token) in enumerate(chosen)]
        if self._routing is not None:
            self._routing.end(self.scheduler, self._clock())
        self.times.step(started, scheduled, computed, sampled)
        return deltas

    def prepare(self, request: Submit) -> None:
        """Compile what `request` needs, so that `add` is quick; any thread may call it. Raise RequestError."""
        if request.params.grammar is not None:
            self._start_grammar(request)

    def add(self, request: Submit) -> None:
        """Queue `request`; raise RequestError for one that can never run."""
        if request.request_id in self._sequences:
            raise RequestError(f"Request {request.request_id} is already running.")
        check(request, vocabulary=self.model.vocab_size, context=self.model.context_length)
        sequence = self._sequence(request)
        reason = _finish_reason(sequence) if request.emitted else None
        if reason is not None:  # its client has every token, and only missed the end
            self._finished.append(Delta(request_id=request.request_id, token_ids=[], finish_reason=reason))
            return
        if self.scheduler.full and not request.emitted:  # who has half an answer is let in
            self._finished.append(self._refuse(request))
            return
        try:
            self.scheduler.submit(sequence)
        except ValueError as error:
            raise RequestError(f"This request can never run: {error}; raise gateway.kv_cache_gib.") from error
        self._sequences[request.request_id] = sequence

    def cancel(self, request_id: str) -> None:
        """Drop a request and free what it holds; unknown ids are ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.finish(sequence)
            if sequence.started_at is not None:
                self._pace.left(self._clock() - sequence.started_at)

    def _sequence(self, request: Submit) -> Sequence:
        params, now = capped(request, self.pool.total * self.pool.block_size), self._clock()
        sequence = Sequence(
            request_id=request.request_id,
            params=params,
            tokens=[*request.prompt_token_ids, *request.emitted],
            prompt_length=len(request.prompt_token_ids),
            seed=self._draw_seed() if params.seed is None else params.seed,
            priority=request.priority,
            deadline=math.inf if request.deadline_s is None else now + request.deadline_s,
            submitted_at=now,
        )
        if params.grammar is not None:
            sequence.sampling.keep_to(self._start_grammar(request))
        return sequence

    def _refuse(self, request: Submit) -> Delta:
        waiting = self.waiting
        return Delta(
            request_id=request.request_id,
            token_ids=[],
            finish_reason="error",
            error=f"The server is busy: {waiting} requests are waiting, and no more are taken. Please retry later.",
            error_status=429,
            retry_after_s=self._pace.wait_s(waiting, self.scheduler.max_sequences),
        )

    def _without_a_step(self) -> list[Delta]:
        """The ends of requests that need no computing: refused, complete when they came, or past their deadline."""
        deltas, self._finished = self._finished, []
        return deltas + [self._give_up(sequence) for sequence in self.scheduler.expired(self._clock())]

    def _give_up(self, sequence: Sequence) -> Delta:
        where = "waited in the queue" if sequence.started_at is None else "was being answered"
        return self._end_in_error(sequence, f"The request's deadline passed while it {where}.", status=504)

    def _start_grammar(self, request: Submit) -> GrammarState:
        if self._grammars is None:
            raise RequestError("This gateway knows no grammars: `response_format` can't be used.")
        return self._grammars.start(request.params.grammar or "", len(request.prompt_token_ids))

    def _emit(self, sequence: Sequence, token: int, logprobs: Logprobs | None) -> Delta:
        if token == INVALID:
            sentence = sequence.sampling.failure or "The model's output is not a number; the request was ended."
            return self._end_in_error(sequence, sentence)
        now, first = self._clock(), sequence.answered_at is None
        if first:
            sequence.answered_at = now
        sequence.tokens.append(token)
        if self.model.rope is not None and len(sequence.tokens) == self.model.rope.restart_length:
            sequence.computed = 0
        reason = _finish_reason(sequence)
        if reason is not None:
            self.cancel(sequence.request_id)
        return Delta(
            request_id=sequence.request_id,
            token_ids=[token],
            finish_reason=reason,
            stop_token=reason == "stop" and token in sequence.params.stop_token_ids,
            logprobs=logprobs,
            prompt_logprobs=sequence.sampling.take_prompt_logprobs(),
            cached_tokens=sequence.cached if first else 0,
            timings=sequence.timings(now) if reason else None,
        )

    def _fail(self, works: list[Work], failure: Exception) -> list[Delta]:
        log.error("a step of %d sequences failed; they end in an error", len(works), exc_info=failure)
        sentence = f"The gateway could not compute the next token ({type(failure).__name__}); the request was ended."
        for work in works:
            work.sequence.suspect = True
        return [self._end_in_error(work.sequence, sentence) for work in works]

    def _end_in_error(self, sequence: Sequence, sentence: str, status: int = 500) -> Delta:
        self.cancel(sequence.request_id)
        return Delta(
            request_id=sequence.request_id,
            token_ids=[],
            finish_reason="error",
            error=sentence,
            error_status=status,
            timings=sequence.timings(self._clock()),
        )


def _score_prompts(logits: torch.Tensor, batch: Batch) -> None:
    start = len(batch.sampled)
    for sequence, rows in batch.scored:
        if (wanted := sequence.sampling.prompt_logprobs) is not None:
            wanted.add(logits[start : start + rows], sequence.tokens)
        start += rows


def _damaged(logits: torch.Tensor, sequences: list[Sequence], tokens: list[int]) -> list[Sequence]:
    """Those without a token because of what the model computed, not of what they allow."""
    rows = [row for row, token in enumerate(tokens) if token == INVALID and bool(logits[row].isnan().any())]
    return [sequences[row] for row in rows]


def _finish_reason(sequence: Sequence) -> str | None:
    params = sequence.params
    if sequence.tokens[-1] in params.stop_token_ids and sequence.generated > params.min_tokens:
        return "stop"
    if sequence.sampling.completed(sequence.tokens):
        return "stop"
    return "length" if sequence.generated >= params.max_tokens else None
