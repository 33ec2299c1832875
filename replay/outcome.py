"""What became of each request of a replay: one JSON object a line."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import msgspec


class Outcome(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One request, as the client saw it. Times are seconds since `sent_s` unless said otherwise."""

    index: int
    """Its number in the selected trace"""
    request_id: str
    """What the server was told in ``x-request-id``"""
    due_s: float
    """When the trace wanted it sent, seconds since the replay began"""
    sent_s: float | None = None
    """When it was sent, seconds since the replay began; missing: never"""
    late_s: float | None = None
    """`sent_s` - `due_s`"""
    kind: str = ""
    prompt_tokens: int
    """Asked for"""
    answer_tokens: int
    """Asked for"""
    prompt_tokens_told: int | None = None
    """As the server counted them"""
    status: int | None = None
    """Of HTTP; missing: there was no answer"""
    retries: int = 0
    first_token_s: float | None = None
    end_s: float | None = None
    """When the answer had ended"""
    tokens: int = 0
    """Of the answer, as the server counted them, else as many as came"""
    token_s: list[float] = msgspec.field(default_factory=list)
    """Each token's time; tokens that came together share theirs"""
    finish_reason: str | None = None
    error: str | None = None
    """``KIND: what happened``; missing: the request went well"""

    @property
    def error_kind(self) -> str | None:
        """What the error begins with: few kinds, to be counted."""
        return None if self.error is None else self.error.partition(":")[0]

    @property
    def per_token_s(self) -> float | None:
        """Time per output token after the first (TPOT); None where there were not two."""
        if len(self.token_s) < 2 or self.token_s[-1] == self.token_s[0]:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)


class OutcomeWriter:
    """Writes outcomes to a file as they come."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=1 << 18)
        self._encoder = msgspec.json.Encoder()

    def write(self, outcome: Outcome) -> None:
        """Add one."""
        self._file.write(self._encoder.encode(outcome) + b"\n")

    def __enter__(self) -> OutcomeWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def read_outcomes(path: Path) -> list[Outcome]:
    """The outcomes in a file that `OutcomeWriter` wrote."""
    return msgspec.json.Decoder(Outcome).decode_lines(path.read_bytes())
