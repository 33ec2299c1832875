"""Continuous batching as bookkeeping: budget, order, blocks, and that everyone gets through."""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.blocks import BlockPool
from gateway.messages import SamplingParams
from gateway.scheduler import Scheduler, Work
from gateway.sequence import Sequence


def sequence(name: str, prompt: int, max_tokens: int = 4) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens)
    return Sequence(request_id=name, params=params, tokens=[1] * prompt, prompt_length=prompt, seed=0)


def scheduler(blocks: int = 100, block_size: int = 4, token_budget: int = 16, max_sequences: int = 8) -> Scheduler:
    return Scheduler(BlockPool(blocks, block_size), token_budget=token_budget, max_sequences=max_sequences)


def complete(plan: Scheduler, works: list[Work]) -> list[Sequence]:
    """What an engine does after its forward; returns the sequences that finished."""
    sampling = [work.sequence for work in works if work.samples]
    plan.advance(works)
    finished = []
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
    assert list(plan.waiting) == [young]
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


@dataclass(frozen=True)
class Arrival:
    step: int
    prompt: int
    max_tokens: int
    cancelled_after: int | None


arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 20),
        prompt=st.integers(1, 30),
        max_tokens=st.integers(1, 12),
        cancelled_after=st.none() | st.integers(0, 12),
    ),
    max_size=12,
)


@given(
    arrivals=arrivals,
    blocks=st.integers(1, 14),
    block_size=st.integers(1, 6),
    max_sequences=st.integers(1, 5),
    spare_budget=st.integers(0, 12),
)
def test_whatever_arrives_everyone_is_served_within_the_budget_and_blocks_come_back(
    arrivals: list[Arrival], blocks: int, block_size: int, max_sequences: int, spare_budget: int
) -> None:
    budget = max_sequences + spare_budget
    plan = scheduler(blocks, block_size, budget, max_sequences)
    todo = sorted(arrivals, key=lambda arrival: arrival.step)
    order: dict[str, int] = {}
    alive: dict[str, tuple[Sequence, int | None]] = {}
    # One at a time, each would take its prompt's chunks and its tokens; preemption repeats work, but never endlessly.
    patience = 50 + 20 * sum(a.prompt + a.max_tokens for a in todo)
    for step in range(patience):
        while todo and todo[0].step <= step:
            arrival = todo.pop(0)
            one = sequence(f"r{len(order)}", arrival.prompt, arrival.max_tokens)
            order[one.request_id] = len(order)
            if plan.fits(one.length_limit):
                plan.submit(one)
                leaves = None if arrival.cancelled_after is None else step + arrival.cancelled_after
                alive[one.request_id] = (one, leaves)
        for name in [name for name, (_, leaves) in alive.items() if leaves is not None and leaves <= step]:
            plan.finish(alive.pop(name)[0])
        works = plan.schedule()
        check_step(plan, works, order, budget, max_sequences)
        for one in complete(plan, works):
            del alive[one.request_id]
        if not alive and not todo:
            break
    assert not alive
    assert not plan.has_work
    assert plan.pool.used == 0


def check_step(plan: Scheduler, works: list[Work], order: dict[str, int], budget: int, max_sequences: int) -> None:
    assert sum(work.count for work in works) <= budget
    assert len(works) <= len(plan.running) <= max_sequences
    assert len({id(work.sequence) for work in works}) == len(works)
    assert bool(works) == plan.has_work  # never idle while someone waits
    for work in works:
        one = work.sequence
        assert 1 <= work.count <= one.pending
        assert len(one.blocks) * plan.pool.block_size >= one.computed + work.count
    held = [block for one in plan.running for block in one.blocks]
    assert len(held) == len(set(held)) == plan.pool.used
    assert all(not one.blocks and one.computed == 0 for one in plan.waiting)
    places = [order[one.request_id] for one in (*plan.running, *plan.waiting)]
    assert places == sorted(places)  # nobody overtakes
    if plan.running:
        assert any(work.sequence is plan.running[0] for work in works)  # the oldest always goes on
