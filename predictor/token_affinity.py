"""Which experts a text's tokens are routed to: by each token and the one before it, where that is known well enough."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from predictor.affinity import Affinity

_MOST_PAIRS = 1 << 18
_LEAST_PAIRS = 8  # for each token of the vocabulary: in a smaller table pairs would tell little
_TOKEN_COUNTS = 3.0  # for so many observations of a pair its token alone counts
_PRIOR_ROWS = 2.0  # for so many of a token what the caller knows of all tokens counts

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


class TokenAffinity:
    """Affinity of tokens and, where memory allows, of pairs: a pair backs off to its token, that to a mean."""

    def __init__(self, vocabulary: int, cells: int, *, max_bytes: int) -> None:
        """Both tables together take `max_bytes` at most."""
        self._vocabulary = vocabulary
        self._tokens = Affinity(vocabulary, cells, max_bytes=max_bytes)
        left = max_bytes - 4 * cells * self._tokens.buckets
        self._pairs: Affinity | None = None
        if left >= 4 * cells * _LEAST_PAIRS * vocabulary:
            pairs = Affinity(vocabulary**2, cells, max_bytes=left, memory=100.0, most_buckets=_MOST_PAIRS)
            self._pairs = pairs

    def learn(self, tokens: Ints, cells: Ints, follows: npt.NDArray[np.bool_]) -> None:
        """Row r of ``tokens[r]`` went to ``cells[r]``; where `follows`, the token before it is that of row r - 1."""
        self._tokens.learn(self._tokens.bucket(tokens), cells)
        if self._pairs is not None:
            later = np.flatnonzero(follows)
            if len(later):
                self._pairs.learn(self._pair(tokens[later - 1], tokens[later]), cells[later])

    def cost(self, tokens: int) -> int:
        """Rows of tables that `expect` looks up for so many tokens."""
        return tokens if self._pairs is None else 2 * tokens

    def expect(self, tokens: Ints, *, follows: npt.NDArray[np.bool_] | bool = True) -> tuple[Floats, float]:
        """Rows to be expected of `tokens` [n]: (rows [cells], rows left to the prior).

        `follows`: which of the tokens come right after the one before them.
        """
        counts = np.ones(len(tokens), np.float32)
        rows: Floats = np.zeros(1, np.float32)
        if self._pairs is not None and len(tokens) > 1:
            later = 1 + np.flatnonzero(np.broadcast_to(follows, len(tokens))[1:])
            pairs = self._pair(tokens[later - 1], tokens[later])
            rows, counts[later] = self._pairs.expect(pairs, counts[later], _TOKEN_COUNTS)
        by_token, unknown = self._tokens.expect(self._tokens.bucket(tokens), counts, _PRIOR_ROWS)
        return rows + by_token, float(unknown.sum())

    def sampled(self, tokens: Ints, most: int) -> tuple[Floats, float]:
        """Like `expect`, from at most about `most` of the tokens, each without the one before it."""
        some = tokens[:: max(1, len(tokens) // max(most, 1))]
        counts = np.full(len(some), len(tokens) / max(len(some), 1), np.float32)
        rows, unknown = self._tokens.expect(self._tokens.bucket(some), counts, _PRIOR_ROWS)
        return rows, float(unknown.sum())

    def _pair(self, before: Ints, tokens: Ints) -> Ints:
        assert self._pairs is not None
        return self._pairs.bucket(before * self._vocabulary + tokens)
