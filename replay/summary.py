"""What a replay comes to: latencies, throughput, goodput, errors. Numbers are kept, not requests."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from replay.outcome import Outcome
from replay.slo import Slo

METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "gap": "gap between tokens",
    "e2e": "end to end",
}
_EXAMPLES = 5


@dataclass(frozen=True)
class Spread:
    """How a time is spread, seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    longest: float


@dataclass(frozen=True)
class Summary:
    """What a replay came to."""

    sent: int
    succeeded: int
    failed: int
    errors: dict[str, int]
    """How many of each kind"""
    examples: list[str]
    """A few errors in full"""
    retries: int
    span_s: float
    """From the beginning to the end of the last answer"""
    requests_per_s: float
    """That succeeded, over the span"""
    prompt_tokens: int
    """As the server counted them where it did"""
    answer_tokens: int
    answer_tokens_per_s: float
    latencies: dict[str, Spread | None]
    """Of requests that succeeded; see `METRICS`"""
    late: Spread | None
    """How much later than the trace wanted requests were sent"""
    slo: dict[str, float | None]
    goodput: float | None
    """Requests a second that succeeded within the SLO; None without one"""
    good_part: float | None
    """Part of the requests sent that did"""

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class Tally:
    """Takes outcomes one by one."""

    def __init__(self, slo: Slo | None = None) -> None:
        self.times = {name: array("f") for name in METRICS}
        """Seconds, of requests that succeeded; by metric. All but the gaps of those that have none: nan"""
        self.sent_s, self.end_s, self.late_s = array("d"), array("d"), array("f")
        """Of every request: when it was sent and had ended since the replay began; how late it was sent"""
        self.ok = array("b")
        """Whether it succeeded"""
        self.answer_tokens = array("l")
        self._slo = slo
        self._errors: Counter[str] = Counter()
        self._examples: list[str] = []
        self._retries = self._good = self._prompt_tokens = 0

    def add(self, outcome: Outcome) -> None:
        """Count one request that was sent."""
        sent, late, end = outcome.sent_s or 0.0, outcome.late_s or 0.0, outcome.end_s or 0.0
        self.sent_s.append(sent)
        self.late_s.append(max(late, 0.0))
        self.end_s.append(sent + end)
        self.ok.append(outcome.error is None)
        self.answer_tokens.append(outcome.tokens)
        self._retries += outcome.retries
        self._prompt_tokens += outcome.prompt_tokens_told or outcome.prompt_tokens
        self._good += self._slo is not None and self._slo.met(outcome)
        if outcome.error is not None:
            self._errors[outcome.error_kind or ""] += 1
            if self._errors[outcome.error_kind or ""] == 1 and len(self._examples) < _EXAMPLES:
                self._examples.append(f"request {outcome.index}: {outcome.error}")
        for name, value in (("ttft", outcome.first_token_s), ("tpot", outcome.per_token_s), ("e2e", end)):
            self.times[name].append(value if value is not None and outcome.error is None else float("nan"))
        if outcome.error is None and len(outcome.token_s) > 1:
            gaps = np.diff(np.unique(outcome.token_s))  # tokens that came together have no gap
            self.times["gap"].extend(gaps.tolist())

    def summary(self) -> Summary:
        """What it comes to so far."""
        sent, succeeded = len(self.ok), sum(self.ok)
        span_s = max(self.end_s, default=0.0)
        slo = self._slo
        return Summary(
            sent=sent,
            succeeded=succeeded,
            failed=sent - succeeded,
            errors=dict(self._errors.most_common()),
            examples=list(self._examples),
            retries=self._retries,
            span_s=span_s,
            requests_per_s=succeeded / span_s if span_s else 0.0,
            prompt_tokens=self._prompt_tokens,
            answer_tokens=sum(self.answer_tokens),
            answer_tokens_per_s=sum(self.answer_tokens) / span_s if span_s else 0.0,
            latencies={name: spread(column(values)) for name, values in self.times.items()},
            late=spread(column(self.late_s)),
            slo=vars(slo) if slo is not None else {},
            goodput=(self._good / span_s if span_s else 0.0) if slo is not None else None,
            good_part=(self._good / sent if sent else 0.0) if slo is not None else None,
        )


def column(values: array[float]) -> npt.NDArray[np.float64]:
    """The numbers of `values`, those that are none included."""
    return np.array(values, np.float64)


def spread(values: npt.NDArray[np.float64]) -> Spread | None:
    """How `values` are spread, nan left out; None where there are none."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    return Spread(len(values), float(values.mean()), float(p50), float(p90), float(p99), float(values.max()))
