"""Everything at once, on real models in fp32: whatever comes, goes, waits, is cut to chunks, preempted or found in the
cache, every text is what its request gets alone."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.engine import Engine
from gateway.messages import Submit
from tests.checkpoints import FAMILIES
from tests.gateway.inline_model import InlineFamily, answer_all, prompts, single_threaded, submit

BLOCK = 4
BEGINNINGS = prompts(0, 8, 21, seed=21)
ENDS = prompts(1, 4, 9, seed=22)
LONGEST = 21 + 9 + 20
PARAMS: list[dict[str, Any]] = [
    {"max_tokens": 20},
    {"max_tokens": 9, "temperature": 0.9, "seed": 5},
    {"max_tokens": 14, "temperature": 1.2, "seed": 6, "top_p": 0.9, "top_k": 30},
    {"max_tokens": 20, "temperature": 1.0, "seed": 7, "stop_token_ids": tuple(range(40, 60)), "min_tokens": 3},
    {"max_tokens": 1},
]


@dataclass(frozen=True)
class Arrival:
    step: int
    beginning: int
    end: int
    params: int
    priority: int
    leaves_after: int | None

    @property
    def prompt(self) -> list[int]:
        return BEGINNINGS[self.beginning] + ENDS[self.end]


arrivals = st.lists(
    st.builds(
        Arrival,
        step=st.integers(0, 12),
        beginning=st.integers(0, 2),
        end=st.integers(0, 2),
        params=st.integers(0, len(PARAMS) - 1),
        priority=st.integers(-1, 1),
        leaves_after=st.none() | st.none() | st.integers(0, 15),
    ),
    min_size=6,
    max_size=12,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_threaded():
        yield


class Solo:
    """What each request gets alone, in one chunk, with nothing found in a cache."""

    def __init__(self, family: InlineFamily) -> None:
        self._family = family
        self._known: dict[tuple[int, int, int], list[int]] = {}

    def answer(self, arrival: Arrival) -> list[int]:
        which = arrival.beginning, arrival.end, arrival.params
        if which not in self._known:
            engine = self._family.engine(prefix_caching=False)
            [self._known[which]] = answer_all(engine, [arrival.prompt], **PARAMS[arrival.params])
        return self._known[which]


@pytest.mark.parametrize("name", FAMILIES)  # among them windows smaller than the prompts, sinks and latent attention
def test_every_text_is_what_its_request_gets_alone(tmp_path: Path, name: str) -> None:
    family = InlineFamily(name, tmp_path)
    solo = Solo(family)
    seen: Counter[str] = Counter()

    @settings(derandomize=True, max_examples=16, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        todo=arrivals,
        blocks=st.integers(-(-LONGEST // BLOCK), 16),
        max_sequences=st.integers(3, 6),
        spare_budget=st.integers(0, 20),
    )
    def check(todo: list[Arrival], blocks: int, max_sequences: int, spare_budget: int) -> None:
        engine = family.engine(
            kv_cache_gib=(blocks + 0.5) * block_bytes(family) / 2**30,
            block_size=BLOCK,
            max_sequences=max_sequences,
            token_budget=max_sequences + spare_budget,
        )
        texts, ended = play(engine, todo)
        for number, arrival in enumerate(todo):
            whole = solo.answer(arrival)
            assert texts[number] == (whole if ended[number] else whole[: len(texts[number])])
        assert (engine.pool.used, engine.running, engine.waiting) == (0, 0, 0)
        seen.update(
            requests=len(todo),
            left=len(todo) - sum(ended),
            preempted=engine.scheduler.preemptions,
            found=engine.scheduler.prefix_hits,
        )

    check()
    assert seen["requests"] > 60
    assert min(seen["left"], seen["preempted"], seen["found"]) > 0  # all of it did happen


def block_bytes(family: InlineFamily) -> int:
    return 4 * BLOCK * sum(shape.numbers for shape in family.model.kv_shapes.values())


def play(engine: Engine, todo: list[Arrival]) -> tuple[list[list[int]], list[bool]]:
    """Let `todo` arrive and leave; each one's tokens and whether it came to its end."""
    texts: list[list[int]] = [[] for _ in todo]
    ended = [False] * len(todo)
    last = max(arrival.step + (arrival.leaves_after or 0) for arrival in todo)
    step = 0
    while step <= last or engine.has_work:
        for number, arrival in enumerate(todo):
            if arrival.step == step:
                engine.add(request(number, arrival))
            if arrival.leaves_after is not None and arrival.step + arrival.leaves_after == step:
                engine.cancel(str(number))
        for delta in engine.step():
            assert delta.error is None
            texts[int(delta.request_id)] += delta.token_ids
            ended[int(delta.request_id)] = delta.finish_reason is not None
        assert engine.pool.used == len({block for one in engine.scheduler.running for block in one.blocks})
        step += 1
        assert step < 2000
    return texts, ended


def request(number: int, arrival: Arrival) -> Submit:
    asked = submit(str(number), arrival.prompt, **PARAMS[arrival.params])
    return Submit(request_id=asked.request_id, prompt_token_ids=asked.prompt_token_ids, params=asked.params,
                  priority=arrival.priority)  # fmt: skip
