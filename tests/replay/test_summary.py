"""What a replay comes to: percentiles as numpy has them, goodput as promised, errors by kind; and its report."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from replay.outcome import Outcome, OutcomeWriter, read_outcomes
from replay.replay_report import Played, write_report
from replay.slo import Slo, parse_slo
from replay.summary import Tally
from replay.trace import TraceError

PLAYED = Played(
    trace="a <b> & c.csv", url="http://x", model="any", options={"seed": 0, "limit": None}, prompts="token ids"
)


def outcome(index: int, *token_s: float, error: str | None = None, late_s: float = 0.0) -> Outcome:
    return Outcome(
        index=index, request_id=f"{index}", due_s=float(index), sent_s=index + late_s, late_s=late_s, prompt_tokens=10,
        answer_tokens=9, status=200, first_token_s=token_s[0] if token_s else None, token_s=list(token_s),
        tokens=len(token_s), end_s=(token_s[-1] if token_s else 0.0) + 0.5, error=error,
    )  # fmt: skip


def tally(*outcomes: Outcome, slo: Slo | None = None) -> Tally:
    found = Tally(slo)
    for one in outcomes:
        found.add(one)
    return found


def test_latencies_of_requests_that_succeeded() -> None:
    random = np.random.default_rng(0)
    times = [np.cumsum(random.exponential(0.05, 8)) for _ in range(200)]
    done = [outcome(n, *t.tolist()) for n, t in enumerate(times)]
    summary = tally(*done, outcome(200, 50.0, 90.0, error="timeout: x")).summary()
    expected: dict[str, Any] = {
        "ttft": [t[0] for t in times], "tpot": [(t[-1] - t[0]) / 7 for t in times], "e2e": [t[-1] + 0.5 for t in times],
        "gap": np.concatenate([np.diff(t) for t in times]),
    }  # fmt: skip
    for name, values in expected.items():
        spread = summary.latencies[name]
        assert spread is not None
        assert spread.count == len(values)
        found = (spread.mean, spread.p50, spread.p90, spread.p99, spread.longest)
        assert found == pytest.approx((np.mean(values), *np.percentile(values, (50, 90, 99, 100))), rel=1e-5)
    assert (summary.sent, summary.succeeded, summary.failed) == (201, 200, 1)
    assert summary.span_s == pytest.approx(200 + 90.5)


def test_tokens_that_came_together_have_no_gap_but_count_in_the_time_per_token() -> None:
    summary = tally(outcome(0, 1.0, 1.0, 2.0, 2.0, 2.0)).summary()
    gap, tpot = summary.latencies["gap"], summary.latencies["tpot"]
    assert gap is not None
    assert tpot is not None
    assert (gap.count, gap.longest, tpot.p50) == (1, 1.0, 0.25)


def test_answers_of_one_token_have_no_time_per_token() -> None:
    assert tally(outcome(0, 1.0)).summary().latencies["tpot"] is None


def test_goodput_is_what_succeeded_within_the_slo() -> None:
    good, slow, slow_tokens = outcome(0, 0.1, 0.2), outcome(1, 0.9, 1.0), outcome(2, 0.1, 0.9)
    failed = outcome(3, 0.1, 0.2, error="HTTP 500: x")
    summary = tally(good, slow, slow_tokens, failed, slo=Slo(ttft=0.5, tpot=0.2)).summary()
    assert summary.good_part == 0.25
    assert summary.goodput == pytest.approx(1 / summary.span_s)
    assert tally(good, slow, slo=Slo(e2e=1.0)).summary().good_part == 0.5
    assert tally(good).summary().goodput is None


def test_errors_are_counted_by_kind_with_an_example_of_each() -> None:
    errors = ["HTTP 429: not now", "HTTP 429: later", "timeout: 3 s"]
    summary = tally(*(outcome(n, error=error) for n, error in enumerate(errors))).summary()
    assert summary.errors == {"HTTP 429": 2, "timeout": 1}
    assert summary.examples == ["request 0: HTTP 429: not now", "request 2: timeout: 3 s"]


def test_slos_as_people_write_them() -> None:
    assert parse_slo("ttft=500ms, tpot=0.05,e2e=1m") == Slo(0.5, 0.05, 60.0)
    assert str(parse_slo("tpot=50ms")) == "tpot 50ms"
    for wrong in ("", "ttft", "ttft=", "ttft=fast", "speed=1", "ttft=1,ttft=2"):
        with pytest.raises(TraceError, match="--slo"):
            parse_slo(wrong)


def test_outcomes_are_read_as_they_were_written(tmp_path: Path) -> None:
    outcomes = [outcome(0, 0.1, 0.25), outcome(1, error="timeout: x", late_s=0.5)]
    with OutcomeWriter(tmp_path / "requests.jsonl") as writer:
        for one in outcomes:
            writer.write(one)
    assert read_outcomes(tmp_path / "requests.jsonl") == outcomes
    first = json.loads((tmp_path / "requests.jsonl").read_text().splitlines()[0])
    assert (first["sent_s"], first["token_s"], first["status"]) == (0.0, [0.1, 0.25], 200)


class _Page(HTMLParser):
    """What a page refers to, and the ids in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data") and value:
                self.links.append(value)
            if name == "id" and value:
                self.ids.append(value)


def test_the_report_is_one_page_that_needs_nothing_else(tmp_path: Path) -> None:
    done = [outcome(n, 0.1, 0.2, 0.4, late_s=0.02) for n in range(30)]
    summary = write_report(
        tmp_path, replace(PLAYED, complete=False, planned=99, shortened=3),
        tally(*done, outcome(30, error="HTTP 500: <script>alert(1)</script>"), slo=Slo(ttft=0.5)),
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latency.png", "load.png", "report.html", "summary.json", "timeline.png",
    ]  # fmt: skip
    text = (tmp_path / "report.html").read_text()
    page = _Page(text)
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not {"script", "link", "img", "iframe"} & page.tags
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert "a &lt;b&gt; &amp; c.csv" in text
    for sentence in ("Stopped: 31 of 99", "20ms late", "3 requests were shortened", "HTTP 500", "prefers-color-scheme"):
        assert sentence in text
    assert json.loads((tmp_path / "summary.json").read_text())["errors"] == summary.errors == {"HTTP 500": 1}


def test_a_report_of_nothing(tmp_path: Path) -> None:
    summary = write_report(tmp_path, replace(PLAYED, complete=False, planned=5), tally())
    assert summary.sent == 0
    assert "Stopped: 0 of 5" in (tmp_path / "report.html").read_text()


def test_a_report_of_failures_only(tmp_path: Path) -> None:
    summary = write_report(tmp_path, PLAYED, tally(outcome(0, error="no connection: x")))
    assert summary.latencies == dict.fromkeys(("ttft", "tpot", "gap", "e2e"))
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
