"""Made-up traffic: the same for a seed, of the lengths and mix asked for, and never stationary."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.traffic import PROFILES, Request, Traffic

KINDS = ("chat", "code", "data")
TEXTS = {kind: np.arange(20_000, dtype=np.int32) % 100 + 100 * number for number, kind in enumerate(KINDS)}


def requests(count: int, **options: Any) -> list[Request]:
    return list(islice(Traffic(TEXTS, **{"requests_per_s": 10.0, "longest": 1024, "seed": 0, **options}), count))


def test_a_seed_tells_it_all() -> None:
    def plain(seed: int) -> list[Any]:
        return [(r.time_s, r.kind, r.prompt.tolist(), r.answer_tokens, r.seed) for r in requests(50, seed=seed)]

    assert plain(1) == plain(1)
    assert plain(1) != plain(2)


def test_prompts_are_text_of_their_kind() -> None:
    for request in requests(200):
        number = KINDS.index(request.kind)
        assert set(request.prompt // 100) == {number}


@pytest.mark.parametrize("profile", ["prefill-heavy", "decode-heavy"])
def test_lengths_are_those_of_the_profile(profile: str) -> None:
    found = requests(3000, profile=profile)
    [expected] = PROFILES[profile]
    assert np.mean([len(r.prompt) for r in found]) == pytest.approx(expected.prompt_tokens, rel=0.1)
    assert np.mean([r.answer_tokens for r in found]) == pytest.approx(expected.answer_tokens, rel=0.1)


def test_a_mixed_profile_has_requests_of_both() -> None:
    answers = np.array([r.answer_tokens for r in requests(2000, profile="mixed")])
    assert 24 < answers.mean() < 80


def test_nobody_tells_the_service_how_long_the_answer_will_be() -> None:
    found = requests(500)
    assert all(r.max_tokens >= r.answer_tokens for r in found)
    assert np.mean([r.max_tokens > r.answer_tokens for r in found]) > 0.8


def test_requests_arrive_at_the_rate_asked_for() -> None:
    found = requests(20_000, requests_per_s=20.0)
    assert len(found) / found[-1].time_s == pytest.approx(20.0, rel=0.15)


def test_there_are_bursts_and_lulls() -> None:
    times = np.array([r.time_s for r in requests(20_000, requests_per_s=20.0)])
    a_second = np.bincount(times.astype(int))
    assert np.mean(a_second > 40) > 0.02
    assert np.mean(a_second < 5) > 0.02
    assert a_second.var() > 4 * a_second.mean()  # Poisson's would equal it


def test_the_mix_is_the_one_asked_for_in_the_long_run_and_drifts() -> None:
    found = requests(40_000, mix={"chat": 1, "code": 3, "data": 0}, requests_per_s=10.0)
    total = Counter(r.kind for r in found)
    assert total["data"] == 0
    assert 1.5 < total["code"] / total["chat"] < 6
    shares = [Counter(r.kind for r in found[i : i + 500])["code"] / 500 for i in range(0, len(found), 500)]
    assert max(shares) - min(shares) > 0.3


def test_some_requests_begin_like_an_earlier_one() -> None:
    found = requests(1000)
    beginnings = Counter((r.kind, tuple(r.prompt[:8].tolist())) for r in found)
    assert 1 - len(beginnings) / len(found) > 0.05


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    longest=st.integers(32, 600),
    profile=st.sampled_from(sorted(PROFILES)),
    rate=st.floats(0.01, 1000),
)
def test_any_request_can_be_served(seed: int, longest: int, profile: str, rate: float) -> None:
    before = 0.0
    for request in requests(30, seed=seed, longest=longest, profile=profile, requests_per_s=rate):
        assert request.time_s >= before
        before = request.time_s
        assert len(request.prompt) >= 1
        assert 1 <= request.answer_tokens <= request.max_tokens
        assert len(request.prompt) + request.max_tokens <= longest


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"profile": "heavy"}, "unknown profile 'heavy'"),
        ({"mix": {"prose": 1}}, "no text of kind 'prose': the kinds are chat, code, data"),
        ({"mix": {"code": 0}}, "not all 0"),
        ({"mix": {"code": -1, "chat": 2}}, "0 or more"),
        ({"requests_per_s": 0.0}, "a rate above 0"),
        ({"longest": 20}, "no room"),
    ],
)
def test_what_can_not_be_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        requests(1, **options)
