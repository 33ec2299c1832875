"""What an operator promised: bounds on the times of a request."""

from __future__ import annotations

from dataclasses import dataclass, fields

from replay.outcome import Outcome
from replay.spans import parse_duration, tell_duration
from replay.trace import TraceError


@dataclass(frozen=True)
class Slo:
    """Seconds at most; None: not promised."""

    ttft: float | None = None
    """To the first token"""
    tpot: float | None = None
    """Per token after it"""
    e2e: float | None = None
    """To the end of the answer"""

    def met(self, outcome: Outcome) -> bool:
        """Whether a request went well, and within all bounds."""
        times = (outcome.first_token_s, outcome.per_token_s, outcome.end_s)
        return outcome.error is None and all(
            bound is None or time is None or time <= bound
            for bound, time in zip((self.ttft, self.tpot, self.e2e), times, strict=True)
        )

    def __str__(self) -> str:
        return ", ".join(f"{name} {tell_duration(bound)}" for name, bound in vars(self).items() if bound is not None)


def parse_slo(text: str) -> Slo:
    """``ttft=500ms,tpot=50ms``; raise TraceError for anything else."""
    names = [field.name for field in fields(Slo)]
    bounds: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in names or name in bounds:
            example = ",".join(f"{known}=500ms" for known in names)
            raise TraceError(f"--slo {text!r} is not understood: write {example}, or some of them")
        bounds[name] = parse_duration(value, f"--slo {name}")
    return Slo(**bounds)
