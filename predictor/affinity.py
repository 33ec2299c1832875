"""Which experts a token is routed to, learned online in bounded memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MIXER = 0x9E3779B1  # Knuth's multiplicative hash


class Affinity:
    """key -> rows per expert [cells], a mean over what was seen that fades with each key's own observations.

    Keys are hashed into a table of at most `max_bytes`; those that share a bucket share their mean. A key that was
    rarely seen is drawn towards what the caller knows otherwise. Each bucket's sums grow by rising weights instead of
    being scaled down, so that to learn costs only the cells that a row touched.
    """

    def __init__(
        self, keys: int, cells: int, *, max_bytes: int = 64 << 20, memory: float = 500.0, most_buckets: int = 1 << 62
    ) -> None:
        """`memory`: about how many of a key's observations count."""
        self.buckets = max(1, min(keys, max_bytes // (4 * cells), most_buckets))
        self._hashed = self.buckets < keys
        self._cells = cells
        self._sums = np.zeros((self.buckets, cells), np.float32)
        self._weight = np.zeros(self.buckets, np.float32)
        self._gain = np.ones(self.buckets, np.float32)
        self._growth = 1 / (1 - 1 / memory)

    def bucket(self, keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where keys are kept."""
        if not self._hashed:
            return keys
        return (keys * _MIXER >> 7) % self.buckets

    def learn(self, buckets: npt.NDArray[np.int64], cells: npt.NDArray[np.int64]) -> None:
        """Add observations: row r of bucket ``buckets[r]`` went to ``cells[r]`` [R, c], each cell once."""
        gain = self._gain[buckets]
        where = (buckets[:, None] * self._cells + cells).ravel()
        np.add.at(self._sums.reshape(-1), where, np.repeat(gain, cells.shape[1]))
        np.add.at(self._weight, buckets, gain)
        np.multiply.at(self._gain, buckets, np.float32(self._growth))
        large = self._gain[buckets] > 1e6
        if large.any():
            self._rescale(np.unique(buckets[large]))

    def expect(
        self, buckets: npt.NDArray[np.int64], counts: npt.NDArray[np.float32], prior_weight: float
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Rows to be expected of `counts` [S, n] rows in each bucket: (rows [S, cells], left to the prior [S]).

        `prior_weight`: for how many observations the prior counts.
        """
        weight, gain = self._weight[buckets], self._gain[buckets] * np.float32(prior_weight)
        known = (counts / np.maximum(weight + gain, 1e-30)).astype(np.float32)
        return known @ self._sums[buckets], known @ gain

    def doubt(self, buckets: npt.NDArray[np.int64], prior_weight: float) -> npt.NDArray[np.float32]:
        """How much of a row in each of `buckets` is left to the prior, see `expect`."""
        gain = self._gain[buckets] * np.float32(prior_weight)
        return np.asarray(gain / (self._weight[buckets] + gain), np.float32)

    def distinct(
        self, buckets: npt.NDArray[np.int64], ends: list[int], weights: npt.NDArray[np.float32] | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Which buckets there are, and how often each is among the first ``ends[s]`` of them: ([n], [S, n]).

        `weights`: for how much each of the first ones counts; those behind them count as one.
        """
        if weights is not None:
            weights = np.concatenate([weights, np.ones(len(buckets) - len(weights), np.float32)])
        found, where, size = None, buckets, self.buckets
        if self.buckets > 4 * len(buckets) + 4096:  # sorting is cheaper than counting all buckets
            found, where = np.unique(buckets, return_inverse=True)
            size = len(found)
        parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        counts = np.stack(
            [np.bincount(where[part], None if weights is None else weights[part], minlength=size) for part in parts]
        )
        if found is None:
            found = np.flatnonzero(counts.sum(axis=0))
            counts = counts[:, found]
        return found, np.cumsum(counts, axis=0).astype(np.float32)

    def _rescale(self, buckets: npt.NDArray[np.int64]) -> None:
        scale = 1 / self._gain[buckets]
        self._sums[buckets] *= scale[:, None]
        self._weight[buckets] *= scale
        self._gain[buckets] = 1.0
