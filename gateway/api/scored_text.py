"""Texts whose tokens come with log-probabilities: these keep in step with what is said of the text."""

from __future__ import annotations

import itertools
from collections import deque

import msgspec

from gateway.api.text import Piece, ScoredToken, SequenceText
from gateway.messages import Delta


class ScoredText:
    """`text`, with its tokens in the pieces that complete them.

    A token is held back as long as any of its characters is. Where a stop string ends the text, the last token is the
    one that wrote the last character; a stop token is no part of it.
    """

    def __init__(self, text: SequenceText, start: int = 0) -> None:
        """The text begins at character `start` of the choice: behind an echoed prompt."""
        self._text = text
        self._start = start
        self._given = 0
        self._open: list[ScoredToken] = []
        """Tokens whose characters are not complete yet."""
        self._waiting: deque[tuple[int, ScoredToken]] = deque()
        """Complete ones, each with the character it ends before."""

    def push(self, delta: Delta) -> Piece:
        """The piece that `delta`, which is no error, adds."""
        pieces = []
        for part in _single_tokens(delta):
            offset = self._text.length
            pieces.append(self._text.push(part))
            if part.token_ids and not part.stop_token:
                self._open.append(_scored(part, self._start + offset))
            if not self._text.holding:
                self._waiting.extend((self._text.length, token) for token in self._open)
                self._open = []
            if pieces[-1].finish_reason:
                break
        text = "".join(piece.text for piece in pieces)
        self._given += len(text)
        last = pieces[-1]
        scored = self._rest() if last.finish_reason else self._complete()
        return Piece(text, last.tokens, last.finish_reason, scored, last.cached_tokens)

    def _complete(self) -> list[ScoredToken]:
        """The tokens of which every character was given."""
        out = []
        while self._waiting and self._waiting[0][0] <= self._given:
            out.append(self._waiting.popleft()[1])
        return out

    def _rest(self) -> list[ScoredToken]:
        tokens = itertools.chain((token for _, token in self._waiting), self._open)
        end = self._start + self._given
        return [token for token in tokens if not self._text.stopped or token.offset < end]


def _single_tokens(delta: Delta) -> list[Delta]:
    """One delta for each token; the last has what belongs to the end."""
    if len(delta.token_ids) < 2:
        return [delta]
    rows = delta.logprobs.split() if delta.logprobs is not None else [None] * len(delta.token_ids)
    parts = [
        Delta(request_id=delta.request_id, token_ids=[token], logprobs=row)
        for token, row in zip(delta.token_ids, rows, strict=True)
    ]
    parts[-1] = msgspec.structs.replace(delta, token_ids=delta.token_ids[-1:], logprobs=rows[-1])
    return parts


def _scored(delta: Delta, offset: int) -> ScoredToken:
    if delta.logprobs is None:
        return ScoredToken(delta.token_ids[0], offset, None)
    [(logprob, best)] = delta.logprobs.rows()
    return ScoredToken(delta.token_ids[0], offset, logprob, best)
