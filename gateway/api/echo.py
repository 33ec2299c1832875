"""``echo``: an answer that begins with its prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gateway.api.detokenizer import Decode, Detokenizer
from gateway.api.text import Piece, ScoredToken, Text
from gateway.messages import Delta


class EchoedText:
    """`text` behind `prompt`, whose tokens are scored where the gateway tells their log-probabilities.

    With `alone` there is nothing but the prompt: the text ends with the first delta.
    """

    def __init__(self, text: Text, prompt: str, tokens: Sequence[int], decode: Decode, *, alone: bool = False) -> None:
        self._text = text
        self._prompt = prompt
        self._tokens = tokens
        self._decode = decode
        self._alone = alone
        self._begun = False

    def push(self, delta: Delta) -> Piece:
        """The piece that `delta`, which is no error, adds; the first has the whole prompt."""
        piece = self._text.push(delta)
        if self._begun:
            return piece
        self._begun = True
        scored = self._scored(delta)
        if self._alone:
            return Piece(self._prompt, 0, "length", scored, piece.cached_tokens)
        return dataclasses.replace(piece, text=self._prompt + piece.text, scored=[*scored, *piece.scored])

    def _scored(self, delta: Delta) -> list[ScoredToken]:
        if delta.prompt_logprobs is None:
            return []
        detokenizer, offset, scored = Detokenizer(self._decode), 0, []
        rows = [(None, []), *delta.prompt_logprobs.rows()]  # nothing comes before the first token
        for token, (logprob, best) in zip(self._tokens, rows, strict=True):
            scored.append(ScoredToken(token, offset, logprob, best))
            offset += len(detokenizer.push(token))
        return scored
