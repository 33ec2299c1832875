"""Window, scale, speed and limit: what they promise for any trace, however it is cut into chunks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.spans import parse_duration, parse_window, tell_duration
from replay.trace import Chunk, TraceError, TraceRequest, requests
from replay.transforms import Selection, answered, in_order, limit, scale, speed, window

Rows = list[TraceRequest]


@st.composite
def chunked(draw: st.DrawFn) -> list[Chunk]:
    """A trace with times that repeat and leap, cut into chunks anywhere (some of them empty)."""
    gaps = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.25]), min_size=1, max_size=40))
    size = len(gaps)
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=4)))
    whole = Chunk(
        np.cumsum(gaps) - gaps[0],
        np.arange(size) + 1,
        np.arange(size) % 3,
        tuple((row % 4, 100 + row) for row in range(size)) if draw(st.booleans()) else None,
        tuple("ab"[row % 2] for row in range(size)) if draw(st.booleans()) else None,
    )
    return [whole.take(np.arange(a, b)) for a, b in zip([0, *cuts], [*cuts, size], strict=True)]


def rows(chunks: object) -> Rows:
    return list(requests(chunks))  # type: ignore[arg-type]


def renumbered(found: Rows) -> Rows:
    return [replace(row, index=0) for row in found]


def whole(chunks: list[Chunk]) -> list[Chunk]:
    return list(in_order(chunks))


FACTORS = st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 3.7])


@given(chunked(), st.sampled_from([0.0, 0.5, 3.0]), st.sampled_from([None, 4.0, 20.0]))
def test_a_window_has_what_lies_in_it(chunks: list[Chunk], start: float, end: float | None) -> None:
    expected = [row for row in rows(chunks) if start <= row.time_s and (end is None or row.time_s < end)]
    found = rows(window(chunks, start, end))
    assert renumbered(found) == renumbered([replace(row, time_s=row.time_s - start) for row in expected])


@given(chunked(), FACTORS)
def test_speed_changes_nothing_but_the_clock(chunks: list[Chunk], factor: float) -> None:
    for before, after in zip(rows(chunks), rows(speed(chunks, factor)), strict=True):
        assert after == replace(before, time_s=before.time_s / factor)


@given(chunked(), st.integers(1, 50))
def test_a_limit_keeps_the_first(chunks: list[Chunk], most: int) -> None:
    assert rows(limit(chunks, most)) == rows(chunks)[:most]


@given(chunked())
def test_failures_are_left_out(chunks: list[Chunk]) -> None:
    assert renumbered(rows(answered(chunks))) == renumbered([row for row in rows(chunks) if row.answer_tokens])


@given(chunked(), FACTORS, st.integers(0, 3))
def test_scaling_does_not_depend_on_chunks_and_keeps_order(chunks: list[Chunk], factor: float, seed: int) -> None:
    found = rows(scale(chunks, factor, seed))
    assert found == rows(scale(whole(chunks), factor, seed))
    assert [row.time_s for row in found] == sorted(row.time_s for row in found)


@given(chunked(), FACTORS, st.integers(0, 3))
def test_every_request_comes_as_often_as_the_factor_says(chunks: list[Chunk], factor: float, seed: int) -> None:
    counts = Counter(row.prompt_tokens for row in rows(scale(chunks, factor, seed)))
    for row in rows(chunks):
        assert int(factor) <= counts[row.prompt_tokens] <= int(np.ceil(factor))


@given(chunked(), st.integers(0, 3))
def test_copies_arrive_before_the_next_request_and_share_no_prefix_with_it(chunks: list[Chunk], seed: int) -> None:
    original = {row.prompt_tokens: row for row in rows(chunks)}
    seen: set[tuple[float, int]] = set()
    for row in rows(scale(chunks, 2.0, seed)):
        source, after = original[row.prompt_tokens], original.get(row.prompt_tokens + 1)
        latest = source.time_s if after is None else after.time_s
        assert source.time_s <= row.time_s <= latest
        if row.hash_ids:
            copy = row.hash_ids[0] >> 48
            assert tuple(i - (copy << 48) for i in row.hash_ids) == source.hash_ids
            seen.add((copy, row.prompt_tokens))
    if chunks[0].hash_ids is not None:
        assert len(seen) == 2 * len(original)


def test_scaling_gives_the_rate_asked_for() -> None:
    count = 20_000
    chunk = Chunk(np.arange(count) / 10.0, np.ones(count, np.int64), np.ones(count, np.int64))
    for factor in (0.25, 1.75, 3.2):
        found = rows(scale([chunk], factor))
        assert len(found) == pytest.approx(factor * count, rel=0.03)
    thin = [{row.time_s for row in rows(scale([chunk], 0.5, seed))} for seed in (0, 1)]
    assert thin[0] != thin[1]


@given(chunked())
def test_a_selection_of_everything_is_the_trace(chunks: list[Chunk]) -> None:
    assert rows(Selection().of(chunks)) == rows(chunks)


def test_a_selection_applies_window_then_scale_then_speed_then_limit() -> None:
    chunk = Chunk(np.arange(100.0), np.arange(100), np.ones(100, np.int64))
    chosen = rows(Selection(window=(10.0, 20.0), scale=2.0, speed=2.0, limit=15).of([chunk]))
    assert len(chosen) == 15
    assert chosen[0].time_s == 0.0
    assert chosen[-1].time_s < 5.0
    assert {row.prompt_tokens for row in chosen} <= set(range(10, 20))


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"speed": -1.0}, {"speed": float("nan")}, {"limit": 0}])
def test_selections_that_are_none(wrong: dict[str, float]) -> None:
    with pytest.raises(TraceError, match=f"--{next(iter(wrong))}"):
        Selection(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5", 1.5), ("500ms", 0.5), ("5m", 300), ("1h30m", 5400), ("2d1h", 176400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text, "x") == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "-1", "abc", "5 minutes", "1h30", "nan", "inf"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(TraceError, match="--x"):
        parse_duration(text, "--x")


def test_windows() -> None:
    assert parse_window("1h..2h") == (3600.0, 7200.0)
    assert parse_window("..10m") == (0.0, 600.0)
    assert parse_window("90..") == (90.0, None)
    for wrong in ("1h", "2h..1h", "5..5", "a..b"):
        with pytest.raises(TraceError, match="--window"):
            parse_window(wrong)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.045, "45ms"), (12.34, "12.3s"), (250, "4m10s"), (3900, "1h05m"), (183600, "2d03h"), (3599.9, "1h00m")],
)
def test_durations_are_told_for_people(seconds: float, text: str) -> None:
    assert tell_duration(seconds) == text
