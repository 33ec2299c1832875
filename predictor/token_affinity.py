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

    def expect(self, tokens: Ints, ends: list[int], pairs: int) -> tuple[Floats, Floats, int]:
        """Rows to be expected of the first ``ends[s]`` of `tokens`, of which the first `pairs` are looked at in pairs.

        (rows [S, cells], left to the prior [S], how many rows of tables were looked up)
        """
        buckets = self._tokens.bucket(tokens)
        rows, looked_up, doubt = self._expect_pairs(tokens[:pairs], ends)
        distinct, counts = self._tokens.distinct(buckets, ends, doubt)
        by_token, unknown = self._tokens.expect(distinct, counts, _PRIOR_ROWS)
        return rows + by_token, unknown, looked_up + len(distinct)

    def _expect_pairs(self, tokens: Ints, ends: list[int]) -> tuple[Floats, int, Floats | None]:
        """What pairs know of the rows of `tokens`, and of each token's row how much is left to the token alone."""
        if self._pairs is None or len(tokens) < 2:
            return np.zeros((1, 1), np.float32), 0, None
        buckets = self._pair(tokens[:-1], tokens[1:])
        distinct, counts = self._pairs.distinct(buckets, [min(max(end - 1, 0), len(buckets)) for end in ends])
        rows, _ = self._pairs.expect(distinct, counts, _TOKEN_COUNTS)
        return (
            rows,
            len(distinct),
            np.concatenate([[1.0], self._pairs.doubt(buckets, _TOKEN_COUNTS)]).astype(np.float32),
        )

    def _pair(self, before: Ints, tokens: Ints) -> Ints:
        assert self._pairs is not None
        return self._pairs.bucket(before * self._vocabulary + tokens)
