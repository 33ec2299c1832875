"""Continuous batching as bookkeeping: budget, order, blocks, and that everyone gets through."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.blocks import BlockPool
from gateway.messages import SamplingParams
from gateway.scheduler import Scheduler, Work
from gateway.sequence import Sequence


def sequence(name: str, prompt: int, max_tokens: int = 4, **more: Any) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(request_id=name, params=params, tokens=[1] * prompt, prompt_length=prompt, seed=0, **more)


def scheduler(
    blocks: int = 100, block_size: int = 4, token_budget: int = 16, max_sequences: int = 8, **more: Any
) -> Scheduler:
    return Scheduler(BlockPool(blocks, block_size), token_budget=token_budget, max_sequences=max_sequences, **more)


def complete(plan: Scheduler, works: list[Work], spoilt: list[Sequence] | None = None) -> list[Sequence]:
    """What an engine does after its forward, which `spoilt` some answers; returns the sequences that finished."""
    sampling = [work.sequence for work in works if work.samples]
    plan.advance(works, sound=not spoilt)
    finished = list(spoilt or [])
    for one in finished:
        sampling.remove(one)
        plan.finish(one)
    for one in sampling:
        one.tokens.append(1)
        if one.generated >= one.params.max_tokens:
            plan.finish(one)
            finished.append(one)
    return finished


def counts(works: list[Work]) -> dict[str, int]:
    return {work.sequence.request_id: work.count for work in works}


def test_a_long_prompt_is_cut_to_the_budget_and_samples_only_at_its_end() -> None:
    plan = scheduler(token_budget=16)
    plan.submit(sequence("a", prompt=40))
    seen = []
    for _ in range(3):
        works = plan.schedule()
        seen.append((works[0].count, works[0].samples))
        complete(plan, works)
    assert seen == [(16, False), (16, False), (8, True)]


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    plan = scheduler(token_budget=16)
    plan.submit(sequence("a", prompt=3, max_tokens=9))
    complete(plan, plan.schedule())
    plan.submit(sequence("long", prompt=100))
    for _ in range(4):
        works = plan.schedule()
        assert counts(works) == {"a": 1, "long": 15}
        complete(plan, works)


def test_an_earlier_prompt_leaves_later_decoders_their_token() -> None:
    plan = scheduler(token_budget=16)
    plan.submit(sequence("long", prompt=37))
    plan.submit(sequence("short", prompt=2))
    works = [plan.schedule()]
    complete(plan, works[-1])
    for _ in range(4):
        works.append(plan.schedule())
        complete(plan, works[-1])
    assert [counts(w) for w in works] == [
        {"long": 16},
        {"long": 16},
        {"long": 5, "short": 2},
        {"long": 1, "short": 1},
        {"long": 1, "short": 1},
    ]


def test_requests_start_in_the_order_they_came() -> None:
    plan = scheduler(max_sequences=2)
    for name in "abc":
        plan.submit(sequence(name, prompt=2))
    assert list(counts(plan.schedule())) == ["a", "b"]
    assert [one.request_id for one in plan.waiting] == ["c"]


def test_the_youngest_gives_its_blocks_up_and_starts_again() -> None:
    plan = scheduler(blocks=4, block_size=4)
    old, young = sequence("old", prompt=4, max_tokens=9), sequence("young", prompt=3, max_tokens=9)
    plan.submit(old)
    plan.submit(young)
    while not plan.preemptions:
        complete(plan, plan.schedule())
    assert young.computed == 0
    assert young.blocks == []
    assert young.generated > 0  # what it said stays said
    assert plan.waiting == [young]
    assert plan.running == [old]
    while plan.has_work:
        complete(plan, plan.schedule())
    assert (old.generated, young.generated) == (9, 9)
    assert plan.pool.used == 0


def test_what_can_never_fit_is_refused_up_front() -> None:
    plan = scheduler(blocks=2, block_size=4)
    plan.submit(sequence("fits", prompt=5, max_tokens=4))  # 9 tokens, of which the last is never computed
    with pytest.raises(ValueError, match="10 tokens does not fit a cache of 8"):
        plan.submit(sequence("never", prompt=5, max_tokens=5))
    assert len(plan.waiting) == 1


def test_a_budget_below_one_token_per_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="token_budget"):
        scheduler(token_budget=4, max_sequences=5)


# ---- order of service -------------------------------------------------------------------------------------------


def test_a_lower_priority_number_is_served_first_and_equals_in_the_order_they_came() -> None:
    plan = scheduler(max_sequences=3)
    for name, priority in (("late", 1), ("a", 0), ("urgent", -5), ("b", 0)):
        plan.submit(sequence(name, prompt=2, priority=priority))
    assert list(counts(plan.schedule())) == ["urgent", "a", "b"]
    assert [one.request_id for one in plan.waiting] == ["late"]


def test_who_runs_keeps_the_place_but_gives_blocks_to_the_more_urgent() -> None:
    plan = scheduler(blocks=4, block_size=4, prefix_caching=False)
    usual, urgent = sequence("usual", prompt=4, max_tokens=9), sequence("urgent", prompt=3, max_tokens=9, priority=-1)
    plan.submit(usual)
    complete(plan, plan.schedule())
    plan.submit(urgent)
    while not plan.preemptions:
        assert plan.running[-1] is usual
        complete(plan, plan.schedule())
    assert plan.running == [urgent]
    assert plan.waiting == [usual]


def test_nobody_waits_for_more_than_the_house_holds_of_later_arrivals() -> None:
    plan = scheduler(max_sequences=1, max_waiting=9)
    plan.submit(sequence("first", prompt=2, max_tokens=1))
    patient = sequence("patient", prompt=2, max_tokens=1, priority=1)
    plan.submit(patient)
    overtaking = 0
    while patient.started_at is None:
        plan.submit(sequence(f"urgent{overtaking}", prompt=2, max_tokens=1))
        overtaking += 1
        complete(plan, plan.schedule())
    assert overtaking == plan.capacity + 1 == 11  # the last one came too late


def test_who_lost_its_gateway_goes_before_those_who_only_wait() -> None:
    plan = scheduler(max_sequences=1)
    plan.submit(sequence("waits", prompt=2))
    moved = sequence("moved", prompt=2)
    moved.tokens += [1, 1]
    plan.submit(moved)
    assert list(counts(plan.schedule())) == ["moved"]


def test_the_queue_is_bounded() -> None:
    plan = scheduler(max_sequences=2, max_waiting=3)
    for name in "abcde":
        assert not plan.full
        plan.submit(sequence(name, prompt=2))
    assert plan.full
    plan.schedule()
    assert plan.full
    plan.finish(plan.waiting[0])
    assert not plan.full


def test_deadlines_come_for_who_runs_and_who_waits() -> None:
    plan = scheduler(max_sequences=1)
    ones = [sequence(name, prompt=2, deadline=deadline) for name, deadline in (("a", 5.0), ("b", 3.0), ("c", math.inf))]
    for one in ones:
        plan.submit(one)
    plan.schedule()
    assert plan.expired(2.9) == []
    assert plan.expired(3.0) == [ones[1]]
    plan.finish(ones[1])
    assert plan.expired(1e9) == [ones[0]]
    plan.finish(ones[0])
    assert plan.expired(1e9) == []


# ---- prefixes ---------------------------------------------------------------------------------------------------


def text(
    *tokens: int, name: str = "r", max_tokens: int = 1, prompt_logprobs: int | None = None, **more: Any
) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
    return Sequence(request_id=name, params=params, tokens=list(tokens), prompt_length=len(tokens), seed=0, **more)


def run(plan: Scheduler, one: Sequence) -> list[int]:
    """Run `one` to its end; the rows of each of its steps."""
    plan.submit(one)
    rows = []
    while one in plan.running or one in plan.waiting:
        works = plan.schedule()
        rows.append(counts(works)[one.request_id])
        complete(plan, works)
    return rows


def test_a_prompt_that_begins_like_another_starts_behind_it() -> None:
    plan = scheduler(block_size=4)
    assert run(plan, text(*range(10))) == [10]
    one = text(*range(9), 77)
    assert run(plan, one) == [2]
    assert one.cached == 8
    assert (plan.prefix_queries, plan.prefix_hits) == (20, 8)


def test_the_last_token_is_always_computed() -> None:
    plan = scheduler(block_size=4)
    run(plan, text(*range(8)))
    assert run(plan, text(*range(8))) == [4]
    assert run(plan, text(*range(9))) == [1]


def test_answers_are_kept_as_prompts_are() -> None:
    plan = scheduler(block_size=4)
    run(plan, text(2, 3, max_tokens=8))  # `complete` answers with ones
    assert run(plan, text(2, 3, 1, 1, 1, 1, 1, 1, 9)) == [1]


def test_nothing_is_found_before_the_step_that_computes_it_has_run() -> None:
    plan = scheduler(block_size=4, token_budget=30)
    first, second = text(*range(9), name="first"), text(*range(9), name="second")
    plan.submit(first)
    plan.submit(second)
    works = plan.schedule()
    assert counts(works) == {"first": 9, "second": 9}
    complete(plan, works)
    assert plan.pool.used == 0
    assert run(plan, text(*range(9))) == [1]


def test_a_chunk_is_found_while_the_rest_of_its_prompt_is_still_computed() -> None:
    plan = scheduler(block_size=4, token_budget=8)
    plan.submit(text(*range(20), name="long"))
    complete(plan, plan.schedule())
    plan.submit(text(*range(8), 77, name="other"))
    for _ in range(2):
        works = plan.schedule()
        complete(plan, works)
    assert counts(works) == {"long": 4, "other": 1}


def test_an_unsound_step_leaves_nothing_to_find_and_its_blocks_are_cleared() -> None:
    cleared: list[int] = []
    plan = Scheduler(BlockPool(10, 4, cleared.extend), token_budget=8, max_sequences=8)
    bad = text(*range(20), name="bad")
    plan.submit(bad)
    plan.advance(plan.schedule(), sound=False)
    plan.advance(plan.schedule())
    blocks = list(bad.blocks)
    plan.finish(bad)
    assert cleared == sorted(blocks)
    assert run(plan, text(*range(20))) == [8, 8, 4]
    assert run(plan, text(*range(20))) == [4]


def test_who_wants_something_of_every_row_computes_every_row_and_leaves_it_to_others() -> None:
    plan = scheduler(block_size=4)
    run(plan, text(*range(9)))
    assert run(plan, text(*range(9), prompt_logprobs=0)) == [9]
    assert run(plan, text(*range(100, 109), prompt_logprobs=0)) == [9]
    assert run(plan, text(*range(100, 109))) == [1]
    assert plan.prefix_queries == 18


def test_without_prefix_caching_everybody_computes_everything() -> None:
    plan = scheduler(block_size=4, prefix_caching=False)
    assert [run(plan, text(*range(9))) for _ in range(2)] == [[9], [9]]
    assert plan.pool.cached == plan.prefix_queries == 0


def test_cached_blocks_that_are_found_are_no_longer_free_for_its_rest() -> None:
    plan = scheduler(blocks=7, block_size=1)
    run(plan, text(0, 1, 2, 3))
    plan.submit(text(9, name="other", max_tokens=3))
    plan.submit(
        text(0, 1, 2, 3, 5, 6, name="long")
    )  # takes four that are free now and two more, and one is to be spare
    assert counts(plan.schedule()) == {"other": 1}


def test_a_preempted_sequence_finds_what_is_left_of_its_own() -> None:
    plan = scheduler(blocks=4, block_size=4)
    old, young = text(*range(4), name="old", max_tokens=9), text(*range(20, 28), name="young", max_tokens=5)
    plan.submit(old)
    plan.submit(young)
    complete(plan, plan.schedule())
    while old in plan.running:
        complete(plan, plan.schedule())
    assert plan.preemptions == 1
    assert len(young.tokens) == 9
    assert counts(plan.schedule()) == {"young": 5}  # the older one needed the second block of its prompt, not the first
    assert young.cached == 0  # for its client nothing was


# ---- whatever arrives -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: list[int]
    max_tokens: int
    priority: int
    leaves_after: int | None
    expires_after: int | None


some_time = st.none() | st.integers(0, 12)
arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 20),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=4).flatmap(
            lambda head: st.integers(1, 8).map(lambda times: head * times)  # prompts that begin alike are common
        ),
        max_tokens=st.integers(1, 12),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        leaves_after=some_time,
        expires_after=some_time,
    ),
    max_size=12,
)

EMPTY, DAMAGED = "empty", "damaged"


class Memory:
    """What a real cache would hold, slot by slot: the text that ends there."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.size = block_size
        self.slots: list[Any] = [EMPTY] * (blocks * block_size)

    def clear(self, blocks: list[int]) -> None:
        for block in blocks:
            self.slots[block * self.size : (block + 1) * self.size] = [EMPTY] * self.size

    def write(self, work: Work, *, damaged: bool) -> None:
        one = work.sequence
        for position in range(one.computed, one.computed + work.count):
            slot = one.blocks[position // self.size] * self.size + position % self.size
            self.slots[slot] = DAMAGED if damaged else tuple(one.tokens[: position + 1])

    def read(self, one: Sequence, tokens: int) -> list[Any]:
        return [self.slots[one.blocks[i // self.size] * self.size + i % self.size] for i in range(tokens)]

    def damages(self, one: Sequence) -> bool:
        return DAMAGED in self.read(one, len(one.blocks) * self.size)


@settings(max_examples=400, deadline=None)
@given(
    arrivals=arrivals,
    blocks=st.integers(1, 14),
    block_size=st.integers(1, 6),
    max_sequences=st.integers(1, 5),
    max_waiting=st.integers(0, 8),
    spare_budget=st.integers(0, 12),
    prefix_caching=st.sampled_from([True, True, True, False]),
    faults=st.sets(st.integers(0, 30), max_size=3),
)
def test_whatever_arrives_everyone_is_served_within_the_budget_and_blocks_come_back(
    arrivals: list[Arrival],
    blocks: int,
    block_size: int,
    max_sequences: int,
    max_waiting: int,
    spare_budget: int,
    prefix_caching: bool,
    faults: set[int],
) -> None:
    budget = max_sequences + spare_budget
    memory = Memory(blocks, block_size)
    plan = Scheduler(
        BlockPool(blocks, block_size, memory.clear),
        token_budget=budget,
        max_sequences=max_sequences,
        max_waiting=max_waiting,
        prefix_caching=prefix_caching,
    )
    todo = sorted(arrivals, key=lambda arrival: arrival.step)
    alive: dict[Sequence, int | None] = {}
    # One at a time, each would take its prompt's chunks and its tokens; preemption repeats work, but never endlessly.
    patience = 50 + 20 * sum(len(a.prompt) + a.max_tokens for a in todo)
    for step in range(patience):
        while todo and todo[0].step <= step:
            arrival = todo.pop(0)
            one = text(*arrival.prompt, max_tokens=arrival.max_tokens, priority=arrival.priority)
            one.deadline = math.inf if arrival.expires_after is None else step + arrival.expires_after
            if plan.fits(one.length_limit) and not plan.full:
                plan.submit(one)
                alive[one] = None if arrival.leaves_after is None else step + arrival.leaves_after
        gone = {one for one, leaves in alive.items() if leaves is not None and leaves <= step} | set(plan.expired(step))
        assert gone >= {one for one in alive if one.deadline <= step}
        for one in gone:
            del alive[one]
            plan.finish(one)
        works = plan.schedule(step)
        check_step(plan, works, step, max_sequences)
        faulty = step in faults and any(work.samples for work in works)
        check_memory(plan, memory, works)
        for work in works:
            memory.write(work, damaged=faulty)
        spoilt = [work.sequence for work in works if work.samples and memory.damages(work.sequence)]
        assert bool(spoilt) >= faulty
        for one in complete(plan, works, spoilt):
            del alive[one]
        check_memory(plan, memory, [])
        if not alive and not todo:
            break
    assert not alive
    assert not plan.has_work
    assert plan.pool.used == 0
    assert plan.expired(math.inf) == []
    assert DAMAGED not in memory.slots


def check_step(plan: Scheduler, works: list[Work], now: int, max_sequences: int) -> None:
    """Budget, places, blocks and order."""
    assert sum(work.count for work in works) <= plan.token_budget
    assert len(works) <= len(plan.running) <= max_sequences
    assert len(plan.running) + len(plan.waiting) <= plan.capacity
    assert len({id(work.sequence) for work in works}) == len(works)
    assert bool(works) == plan.has_work  # never idle while someone waits
    for work in works:
        one = work.sequence
        assert 1 <= work.count <= one.pending
        assert len(one.blocks) * plan.pool.block_size >= one.computed + work.count
    assert len({block for one in plan.running for block in one.blocks}) == plan.pool.used
    assert all(not one.blocks and one.computed == 0 for one in plan.waiting)
    for queue in (plan.running, plan.waiting):
        assert [one.rank for one in queue] == sorted(one.rank for one in queue)
    started = [one.rank for one in plan.running if one.started_at == now]
    if started and plan.waiting:
        assert max(started) < plan.waiting[0].rank  # nobody who waits is passed over
    if plan.running:
        assert any(work.sequence is plan.running[0] for work in works)  # the first always goes on


def check_memory(plan: Scheduler, memory: Memory, works: list[Work]) -> None:
    """Everyone reads what they wrote or would have written; nobody writes where another reads."""
    size = plan.pool.block_size
    for one in plan.running:
        if not one.suspect:
            assert memory.read(one, one.computed) == [tuple(one.tokens[: i + 1]) for i in range(one.computed)]
            assert not memory.damages(one)
    holders = Counter(block for one in plan.running for block in one.blocks)
    for work in works:
        one = work.sequence
        written = one.blocks[one.computed // size : -(-(one.computed + work.count) // size)]
        assert all(holders[block] == 1 for block in written)
