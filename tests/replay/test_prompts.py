"""Prompts have the trace's lengths, are real text, and share what the trace says they share."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.prompts import Prompts, fitted
from replay.trace import TraceRequest

STREAMS = {"chat": np.arange(0, 3000, dtype=np.int32), "code": np.arange(5000, 9000, dtype=np.int32)}
TEXTS = {"chat": "so he said that " * 500, "code": "def add(a, b): return a + b\n" * 300}
FOUR = dict.fromkeys(TEXTS, 4.0)
IDS = Prompts(STREAMS)


def request(index: int, tokens: int, ids: tuple[int, ...] = (), kind: str = "") -> TraceRequest:
    return TraceRequest(index, 0.0, tokens, 5, ids, kind)


@given(st.integers(0, 20_000), st.lists(st.integers(0, 5), max_size=6).map(tuple))
def test_prompts_have_the_length_asked_for(tokens: int, ids: tuple[int, ...]) -> None:
    assert len(IDS.of(request(0, tokens, ids))) == max(tokens, 1)
    assert len(Prompts(TEXTS, FOUR).of(request(0, tokens, ids))) == pytest.approx(max(4 * tokens, 4), abs=1)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_the_same_ids_are_the_same_tokens(a: list[int], b: list[int]) -> None:
    shared = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    first, second = IDS.of(request(0, 512 * len(a), tuple(a))), IDS.of(request(1, 512 * len(b), tuple(b)))
    assert first[: 512 * shared] == second[: 512 * shared]
    assert shared == min(len(a), len(b)) or first[512 * shared] != second[512 * shared]


def test_a_block_that_is_cut_short_is_the_beginning_of_the_whole_one() -> None:
    whole, part = IDS.of(request(0, 1024, (1, 2))), IDS.of(request(1, 700, (1, 2)))
    assert whole[:700] == part


def test_prompts_without_ids_share_nothing_and_follow_from_the_seed() -> None:
    first, second = IDS.of(request(0, 64)), IDS.of(request(1, 64))
    assert first[0] != second[0]
    assert Prompts(STREAMS).of(request(0, 64)) == first
    assert Prompts(STREAMS, seed=1).of(request(0, 64)) != first


def test_prompts_are_text_of_their_kind() -> None:
    assert np.min(np.array(IDS.of(request(0, 100, kind="code")))) >= 5000
    assert np.max(np.array(IDS.of(request(0, 100, (7,), kind="chat")))) < 3000
    assert len(IDS.of(request(0, 100, kind="poetry"))) == 100
    assert str(Prompts(TEXTS, FOUR).of(request(0, 10, kind="code")))[:40] in TEXTS["code"] * 2


def test_prompts_need_text() -> None:
    with pytest.raises(ValueError, match="without text"):
        Prompts({"code": ""})


@given(st.integers(0, 300), st.integers(1, 300), st.integers(2, 100))
def test_requests_are_shortened_to_what_fits(prompt: int, answer: int, longest: int) -> None:
    found = fitted(TraceRequest(0, 0.0, prompt, answer), longest)
    assert found.prompt_tokens + found.answer_tokens <= max(longest, 1)
    assert found.answer_tokens >= 1
    if prompt + answer <= longest:
        assert (found.prompt_tokens, found.answer_tokens) == (prompt, answer)
    assert fitted(found, None) is found
