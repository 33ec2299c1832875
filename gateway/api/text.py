"""The text of one sequence: token deltas in, pieces of text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.api.detokenizer import Decode, Detokenizer
from gateway.api.stop_strings import StopStrings
from gateway.messages import Delta


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token of a text with its log-probability."""

    token: int
    offset: int
    """Characters of the text before it."""
    logprob: float | None
    """None where there is none: for the first token of all."""
    best: Sequence[tuple[int, float]] = ()
    """The most likely tokens in its place and their log-probabilities, in falling order."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a delta added to a text."""

    text: str
    tokens: int
    """Tokens of the sequence so far, those without text included."""
    finish_reason: str | None = None
    """``stop`` or ``length``: no piece follows."""
    scored: Sequence[ScoredToken] = ()
    """The tokens of `text`, where their log-probabilities were asked for."""
    cached_tokens: int = 0
    """Prompt tokens that the gateway had in its cache."""


class Text(Protocol):
    """Turns the deltas of one sequence into pieces."""

    def push(self, delta: Delta) -> Piece:
        """The piece that `delta`, which is no error, adds; after one with a finish reason the sequence is over."""


class SequenceText:
    """Detokenizes one sequence and ends it at its first stop string.

    Like stop tokens, stop strings are not looked for in the first `min_tokens` tokens. After a piece with a finish
    reason the sequence is over, whatever the gateway still sends.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = (), min_tokens: int = 0) -> None:
        self._detokenizer = Detokenizer(decode)
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._tokens = 0
        self._cached_tokens = 0
        self.length = 0
        """Characters so far, those held back for a stop string included."""

    @property
    def holding(self) -> bool:
        """Whether the last token's characters are not complete yet."""
        return self._detokenizer.holding

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._stops.found

    def push(self, delta: Delta) -> Piece:
        """The piece that `delta`, which is no error, adds."""
        text = ""
        self._cached_tokens = max(self._cached_tokens, delta.cached_tokens)
        for token in delta.token_ids[:-1] if delta.stop_token else delta.token_ids:
            self._tokens += 1
            text += self._look(self._detokenizer.push(token))
            if self._stops.found:
                return Piece(text, self._tokens, "stop", cached_tokens=self._cached_tokens)
        self._tokens += delta.stop_token
        if delta.finish_reason is None:
            return Piece(text, self._tokens, cached_tokens=self._cached_tokens)
        text += self._look(self._detokenizer.finish())
        reason = "stop" if self._stops.found else delta.finish_reason
        return Piece(text + self._stops.finish(), self._tokens, reason, cached_tokens=self._cached_tokens)

    def _look(self, text: str) -> str:
        self.length += len(text)
        return text if self._tokens <= self._min_tokens else self._stops.push(text)
