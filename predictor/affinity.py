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
        """Rows to be expected of `counts` [n] rows in `buckets` [n]: (rows [cells], rows left to the prior [n]).

        `prior_weight`: for how many observations the prior counts.
        """
        gain = self._gain[buckets] * np.float32(prior_weight)
        known = np.asarray(counts / np.maximum(self._weight[buckets] + gain, 1e-30), np.float32)
        return known @ self._sums[buckets], known * gain

    def _rescale(self, buckets: npt.NDArray[np.int64]) -> None:
        scale = 1 / self._gain[buckets]
        self._sums[buckets] *= scale[:, None]
        self._weight[buckets] *= scale
        self._gain[buckets] = 1.0
