"""Continuous batching with chunked prefill: which tokens of which sequences the next step computes. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter

from gateway.blocks import BlockPool, extend_keys
from gateway.sequence import Sequence

_RANK = attrgetter("rank")
_DEADLINE = attrgetter("deadline")
_DUE = attrgetter("deadline", "rank")


@dataclass(frozen=True, slots=True)
class Work:
    """Compute the next `count` tokens of `sequence`."""

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        """Whether the last of these rows yields the sequence's next token."""
        return self.count == self.sequence.pending


class Scheduler:
    """By priority, then first come, first served.

    A sequence's rank is its number of arrival plus its priority times the number of sequences the house holds
    (`max_sequences` that run and `max_waiting` that wait). So it comes before every waiting one of a higher priority
    number, but each of those is overtaken by so many later arrivals only: nobody starves.

    Sequences that decode take one token each, the rest of the budget goes to prompts in order of rank. A sequence
    gets the blocks of all its known tokens when it is admitted, those that are cached already without computing them;
    when a decoding sequence finds no block, the last running ones by rank give theirs up, wait at their old place in
    the queue and are recomputed later (preemption by recompute). The first can therefore always go on, and so every
    sequence finishes.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        token_budget: int,
        max_sequences: int,
        max_waiting: int = 1024,
        prefix_caching: bool = True,
    ) -> None:
        if max_sequences < 1:
            raise ValueError(f"max_sequences is {max_sequences}; it must be at least 1")
        if max_waiting < 0:
            raise ValueError(f"max_waiting is {max_waiting}; it must be 0 or more")
        if token_budget < max_sequences:
            raise ValueError(
                f"token_budget ({token_budget}) is smaller than max_sequences ({max_sequences}): a step could not hold "
                "one token of every running sequence; raise token_budget or lower max_sequences"
            )
        self.pool = pool
        self.token_budget = token_budget
        self.max_sequences = max_sequences
        self.hold(max_waiting)
        self.prefix_caching = prefix_caching
        self.running: list[Sequence] = []
        """In order of rank, like `waiting`."""
        self.waiting: list[Sequence] = []
        self.preemptions = 0
        self.prefix_queries = 0
        """Tokens that were looked for in the cache when their sequence started; `prefix_hits` of these were there."""
        self.prefix_hits = 0
        self._arrivals = 0
        self._deadlines: list[Sequence] = []  # those that have one, the earliest first

    @property
    def has_work(self) -> bool:
        """Whether any sequence runs or waits."""
        return bool(self.running or self.waiting)

    @property
    def full(self) -> bool:
        """Whether there is neither a place in the batch nor one in the queue."""
        return len(self.running) + len(self.waiting) >= self.capacity

    def hold(self, max_waiting: int) -> None:
        """Let so many wait from now on; who waits already stays. Any thread may call it."""
        self.capacity = self.max_sequences + max_waiting

    def fits(self, length_limit: int) -> bool:
        """Whether a sequence of `length_limit` tokens could ever run (its last token is never computed)."""
        return self.pool.blocks_for(length_limit - 1) <= self.pool.total

    def submit(self, sequence: Sequence) -> None:
        """Queue `sequence` at its rank; raise ValueError for one that can never run.

        One that comes with generated tokens lost its gateway in the middle of an answer: it goes before its equals.
        """
        if not self.fits(sequence.length_limit):
            raise ValueError(
                f"a sequence of {sequence.length_limit} tokens does not fit a cache of "
                f"{self.pool.total * self.pool.block_size} tokens"
            )
        self._arrivals += 1
        head_start = sequence.priority - bool(sequence.generated)
        sequence.rank = (self._arrivals + head_start * self.capacity, self._arrivals)
        insort(self.waiting, sequence, key=_RANK)
        if sequence.deadline < math.inf:
            insort(self._deadlines, sequence, key=_DUE)

    def expired(self, now: float) -> list[Sequence]:
        """The sequences, running and waiting, whose deadline has come."""
        return self._deadlines[: bisect_right(self._deadlines, now, key=_DEADLINE)]

    def schedule(self, now: float = 0.0) -> list[Work]:
        """The next step's work: at most `token_budget` tokens of at most `max_sequences` sequences, each once."""
        works = self._continue_running()
        self._admit(works, now)
        return works

    def advance(self, works: list[Work], damaged: Collection[Sequence] = ()) -> None:
        """Note that `works` are done: their tokens are in the cache, and others may use them.

        But not those of the `damaged`, of which the model made nothing; nor, where there are any, of those that did not
        come to sampling: nobody has seen what the step made of them.
        """
        for work in works:
            sequence = work.sequence
            if damaged and (not work.samples or sequence in damaged):
                sequence.suspect = True
            sequence.computed += work.count
            full = sequence.computed // self.pool.block_size
            if full > sequence.published and self.prefix_caching and not sequence.suspect:
                self._publish(sequence, full)

    def finish(self, sequence: Sequence) -> None:
        """Forget `sequence`, running or waiting, and free its blocks."""
        queue = self.running if sequence.blocks else self.waiting  # who runs has blocks
        del queue[bisect_left(queue, sequence.rank, key=_RANK)]
        if sequence.deadline < math.inf:
            del self._deadlines[bisect_left(self._deadlines, _DUE(sequence), key=_DUE)]
        self._release(sequence)

    def _continue_running(self) -> list[Work]:
        works: list[Work] = []
        budget = self.token_budget
        reserved = sum(sequence.pending == 1 for sequence in self.running)  # prompts leave every decoder its token
        index = 0
        while index < len(self.running):  # a preemption shortens the list behind `index`
            sequence = self.running[index]
            index += 1
            pending = sequence.pending
            reserved -= pending == 1
            count = 1 if pending == 1 else min(pending, budget - reserved)
            if count and self._make_room(sequence, count):
                works.append(Work(sequence, count))
                budget -= count
        return works

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Find blocks for the next `count` tokens, at the cost of sequences behind it only."""
        while not self.pool.grow(sequence.blocks, sequence.computed + count):
            if self.running[-1] is sequence:
                return False  # it keeps what it has and goes on when one before it has finished
            self._preempt(self.running.pop())
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        insort(self.waiting, sequence, key=_RANK)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        if sequence.suspect:
            self.pool.discard(sequence.blocks)
        else:
            self.pool.release(sequence.blocks)
        sequence.computed = 0
        sequence.suspect = False  # what is computed anew is as good as any

    def _admit(self, works: list[Work], now: float) -> None:
        budget = self.token_budget - sum(work.count for work in works)
        while budget and self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            found = self._find_prefix(sequence)
            if not self._worth_starting(sequence, found):
                return
            del self.waiting[0]
            self._start(sequence, found, now)
            works.append(Work(sequence, min(sequence.pending, budget)))
            budget -= works[-1].count

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Cached blocks of the sequence's tokens, the last token always left to be computed."""
        if not self._reuses(sequence):
            return []
        blocks = (len(sequence.tokens) - 1) // self.pool.block_size
        extend_keys(sequence.keys, sequence.tokens, blocks, self.pool.block_size)
        return self.pool.find(islice(sequence.keys, blocks))

    def _reuses(self, sequence: Sequence) -> bool:
        return self.prefix_caching and not sequence.wants_prompt_logprobs

    def _worth_starting(self, sequence: Sequence, found: list[int]) -> bool:
        """All known tokens must fit, with a block to spare for each running sequence: few starts end in preemption."""
        fresh = self.pool.blocks_for(len(sequence.tokens)) - len(found)
        return fresh + self.pool.cost(found) + len(self.running) <= self.pool.free

    def _start(self, sequence: Sequence, found: list[int], now: float) -> None:
        self.pool.take(sequence.blocks, found)
        self.pool.grow(sequence.blocks, len(sequence.tokens))
        sequence.published = len(found)
        sequence.computed = len(found) * self.pool.block_size
        if sequence.started_at is None:
            sequence.started_at = now
            sequence.cached = min(sequence.computed, sequence.prompt_length)
            self.prefix_queries += len(sequence.tokens) if self._reuses(sequence) else 0
            self.prefix_hits += sequence.computed
        insort(self.running, sequence, key=_RANK)

    def _publish(self, sequence: Sequence, full: int) -> None:
        """Let others find the first `full` blocks of `sequence`."""
        extend_keys(sequence.keys, sequence.tokens, full, self.pool.block_size)
        for index in range(sequence.published, full):
            self.pool.publish(sequence.blocks[index], sequence.keys[index])
        sequence.published = full
