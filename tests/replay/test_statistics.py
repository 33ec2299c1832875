"""What is said of a trace agrees with numpy on all its rows, however it is cut into chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from replay import statistics
from replay.statistics import describe
from replay.trace import Chunk, TraceError
from replay.trace_plot import draw

RANDOM = np.random.default_rng(0)


def trace(gaps: np.ndarray, prompt: int = 100) -> list[Chunk]:
    """A trace with these gaps, in chunks of 1000."""
    time = np.cumsum(gaps) - gaps[0]
    size = len(time)
    whole = Chunk(time, RANDOM.poisson(prompt, size), RANDOM.integers(0, 50, size))
    return [whole.take(np.arange(start, min(start + 1000, size))) for start in range(0, size, 1000)]


def test_lengths_rate_and_failures() -> None:
    chunks = trace(RANDOM.exponential(0.1, 25_500))
    found = describe(chunks)
    prompts = np.concatenate([chunk.prompt_tokens for chunk in chunks])
    answers = np.concatenate([chunk.answer_tokens for chunk in chunks])
    answered = answers[answers > 0]
    assert found.requests == 25_500
    assert found.failed == (answers == 0).sum()
    assert found.rate == pytest.approx(10.0, rel=0.03)
    assert found.prompt_tokens.mean == pytest.approx(prompts.mean())
    assert found.answer_tokens.mean == pytest.approx(answered.mean())
    for name, lengths, values in (("p", found.prompt_tokens, prompts), ("a", found.answer_tokens, answered)):
        expected = [int(np.percentile(values, p, method="inverted_cdf")) for p in (50, 90, 99, 100)]
        assert [lengths.p50, lengths.p90, lengths.p99, lengths.longest] == expected, name
    assert found.arrivals.sum() == 25_500


def test_independent_arrivals_are_not_bursty() -> None:
    found = describe(trace(RANDOM.exponential(0.1, 30_000)))
    assert found.gap_variation == pytest.approx(1.0, abs=0.05)
    assert found.dispersion["1"] == pytest.approx(1.0, abs=0.1)
    assert 0.5 < found.dispersion["60"] < 1.6


def test_clockwork_is_less_and_bursts_are_more_than_independent() -> None:
    assert describe(trace(np.full(3000, 0.1))).gap_variation < 0.01
    bursts = np.where(np.arange(30_000) % 100 == 0, 30.0, 0.01)
    found = describe(trace(bursts))
    assert found.gap_variation > 5
    assert found.dispersion["1"] > 20
    assert found.peak_rate > found.rate


def test_shared_blocks() -> None:
    chunk = Chunk(np.arange(3.0), np.full(3, 1000), np.ones(3, np.int64), ((1, 2), (1, 3), (1, 2)))
    assert describe([chunk]).shared_blocks == pytest.approx(3 / 6)
    assert describe(trace(np.ones(3))).shared_blocks is None


def test_long_spans_and_lengths_take_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_MOST_BINS", 256)
    chunks = [Chunk(np.array([10.0 * n]), np.array([2_000_000]), np.array([1])) for n in range(1000)]
    found = describe(chunks)
    assert len(found.arrivals) <= 256
    assert found.arrivals.sum() == 1000
    assert found.bin_s == 64.0
    assert found.prompt_tokens.longest == pytest.approx(2_000_000, rel=0.001)
    assert len(found.prompt_histogram) < 1_100_000


def test_one_request_and_none() -> None:
    found = describe(trace(np.ones(1)))
    assert (found.requests, found.span_s, found.rate, found.gap_variation) == (1, 0.0, 0.0, 0.0)
    with pytest.raises(TraceError, match="--window"):
        describe([])


@pytest.mark.parametrize("count", [1, 500])
def test_a_picture(tmp_path: Path, count: int) -> None:
    draw(describe(trace(RANDOM.exponential(20.0, count))), "trace", tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
