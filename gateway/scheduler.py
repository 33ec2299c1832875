"""Continuous batching with chunked prefill: which tokens of which sequences the next step computes. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from gateway.blocks import BlockPool
from gateway.sequence import Sequence


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
    """First come, first served.

    Sequences that decode take one token each, the rest of the budget goes to prompts in order of arrival. A sequence
    gets the blocks of all its known tokens when it is admitted; when a decoding sequence finds no block, the youngest
    running ones give theirs up, wait at the head of the queue and are recomputed later (preemption by recompute). The
    oldest sequence can therefore always go on, and so every sequence finishes.
    """

    def __init__(self, pool: BlockPool, *, token_budget: int, max_sequences: int) -> None:
        if max_sequences < 1:
            raise ValueError(f"max_sequences is {max_sequences}; it must be at least 1")
        if token_budget < max_sequences:
            raise ValueError(
                f"token_budget ({token_budget}) is smaller than max_sequences ({max_sequences}): a step could not hold "
                "one token of every running sequence; raise token_budget or lower max_sequences"
            )
        self.pool = pool
        self.token_budget = token_budget
        self.max_sequences = max_sequences
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence runs or waits."""
        return bool(self.running or self.waiting)

    def fits(self, length_limit: int) -> bool:
        """Whether a sequence of `length_limit` tokens could ever run (its last token is never computed)."""
        return self.pool.blocks_for(length_limit - 1) <= self.pool.total

    def submit(self, sequence: Sequence) -> None:
        """Queue `sequence`, behind all that came before; raise ValueError for one that can never run."""
        if not self.fits(sequence.length_limit):
            raise ValueError(
                f"a sequence of {sequence.length_limit} tokens does not fit a cache of "
                f"{self.pool.total * self.pool.block_size} tokens"
            )
        self.waiting.append(sequence)

    def schedule(self) -> list[Work]:
        """The next step's work: at most `token_budget` tokens of at most `max_sequences` sequences, each once."""
        works = self._continue_running()
        self._admit(works)
        return works

    def advance(self, works: list[Work]) -> None:
        """Note that `works` are done: their tokens are in the cache."""
        for work in works:
            work.sequence.computed += work.count

    def finish(self, sequence: Sequence) -> None:
        """Forget `sequence`, running or waiting, and free its blocks."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.pool.release(sequence.blocks)

    def _continue_running(self) -> list[Work]:
        works: list[Work] = []
        budget = self.token_budget
        reserved = sum(sequence.pending == 1 for sequence in self.running)  # prompts leave every decoder its token
        index = 0
        while index < len(self.running):  # a preemption shortens the list behind `index`
            sequence = self.running[index]
            index += 1
            decodes = sequence.pending == 1
            reserved -= decodes
            count = 1 if decodes else min(sequence.pending, budget - reserved)
            if count and self._make_room(sequence, count):
                works.append(Work(sequence, count))
                budget -= count
        return works

    def _make_room(self, sequence: Sequence, count: int) -> bool:
        """Find blocks for the next `count` tokens, at the cost of younger sequences only."""
        while not self.pool.grow(sequence.blocks, sequence.computed + count):
            youngest = self.running[-1]
            if youngest is sequence:
                return False  # it keeps what it has and goes on when an older one has finished
            self._preempt(youngest)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _admit(self, works: list[Work]) -> None:
        budget = self.token_budget - sum(work.count for work in works)
        while budget and self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            if not self._worth_starting(sequence):
                return
            self.pool.grow(sequence.blocks, len(sequence.tokens))
            self.running.append(self.waiting.popleft())
            works.append(Work(sequence, min(sequence.pending, budget)))
            budget -= works[-1].count

    def _worth_starting(self, sequence: Sequence) -> bool:
        """All known tokens must fit, with a block to spare for each running sequence: few starts end in preemption."""
        return self.pool.blocks_for(len(sequence.tokens)) + len(self.running) <= self.pool.free
