"""Made-up traces: the same for a seed, of the shape asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from replay.making import Making, make
from replay.statistics import TraceStatistics, describe
from replay.trace import TraceError, TraceRequest, requests

SMALL = Making(shapes=(), hours=1.0, requests_per_s=5.0, prompt_tokens=300, answer_tokens=50, longest=2048)


def rows(making: Making) -> list[TraceRequest]:
    return list(requests(make(making)))


def statistics(**changes: object) -> TraceStatistics:
    return describe(make(replace(SMALL, **changes)))  # type: ignore[arg-type]


def test_a_seed_tells_it_all() -> None:
    whole = replace(SMALL, shapes=("day", "bursty", "drifting"), hours=0.2)
    assert rows(whole) == rows(whole)
    assert rows(whole) != rows(replace(whole, seed=1))


def test_a_steady_trace_has_the_rate_and_lengths_asked_for() -> None:
    found = statistics()
    assert found.rate == pytest.approx(5.0, rel=0.03)
    assert found.gap_variation == pytest.approx(1.0, abs=0.05)
    assert found.prompt_tokens.mean == pytest.approx(300, rel=0.05)
    assert found.answer_tokens.mean == pytest.approx(50, rel=0.05)


def test_a_bursty_trace_is_bursty() -> None:
    found = statistics(shapes=("bursty",), hours=2.0)
    assert found.rate == pytest.approx(5.0, rel=0.15)
    assert found.dispersion["1"] > 3
    assert found.gap_variation > 1.2


def test_a_day_has_a_night() -> None:
    day = replace(SMALL, shapes=("day",), hours=24.0, requests_per_s=0.3)
    time = np.array([row.time_s for row in rows(day)])
    night, noon = (((time > at - 3600) & (time < at + 3600)).sum() / 7200 for at in (4 * 3600, 16 * 3600))
    assert night == pytest.approx(0.3 * 0.3, rel=0.2)
    assert noon == pytest.approx(1.7 * 0.3, rel=0.1)
    assert len(time) / 86400 == pytest.approx(0.3, rel=0.05)


def test_a_day_can_begin_at_any_hour() -> None:
    night = rows(replace(SMALL, shapes=("day",), starts_at_h=3.5))
    noon = rows(replace(SMALL, shapes=("day",), starts_at_h=15.5))
    assert len(noon) > 4 * len(night)


def test_the_mix_drifts() -> None:
    def spread(*shapes: str) -> float:
        found = rows(replace(SMALL, shapes=shapes))
        shares = [np.mean([row.kind == "code" for row in found[at : at + 500]]) for at in range(0, 15_000, 500)]
        return float(np.std(shares))

    assert spread("drifting") > 3 * spread()


def test_some_prompts_begin_like_earlier_ones() -> None:
    found = rows(replace(SMALL, hours=0.2))
    shared = {row.hash_ids[0] for row in found}
    assert 0.7 < len(shared) / len(found) < 0.95
    assert all(len(row.hash_ids) == -(-row.prompt_tokens // 512) for row in found)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"shapes": ("wild",)}, "unknown --shape 'wild'"), ({"hours": 0.0}, "hours"), ({"longest": 8}, "no room")],
)
def test_traces_that_can_not_be_made(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(TraceError, match=sentence):
        rows(replace(SMALL, **wrong))  # type: ignore[arg-type]
