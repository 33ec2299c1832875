"""The analytic forecast: which rows come, and how each kind of them is routed.

Rows of the horizon are prompt rows already queued, prompt rows of requests nobody knows yet, rows that running
sequences decode and rows of answers that have not begun. How many of each is forecast from the queue and the pace; each
kind's shares come from the sources that know most about it. How far each source is trusted is fitted (non-negative
least squares), layer by layer: a collapsed layer needs other weights than one that follows the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import lightgbm as lgb
import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from predictor import trees
from predictor.features import SCALARS, SHARES
from predictor.samples import Samples

Array = npt.NDArray[np.float32]

KINDS = ("queued", "unknown prompts", "running answers", "new answers")
SOURCES: tuple[tuple[int, str], ...] = (
    (0, "queue_far"),
    (0, "queue_near"),
    (0, "prompt_own"),
    (1, "prefill:16"),
    (1, "prefill:64"),
    (1, "prefill:256"),
    (1, "queue_far"),
    (1, "static"),
    (2, "decode_near"),
    (2, "decode:16"),
    (2, "decode:64"),
    (3, "decode:64"),
    (3, "decode:256"),
    (3, "queue_far"),
    (3, "static"),
)
"""(kind of rows, estimate of its shares)"""


@dataclass(frozen=True)
class RowsForecast:
    """How many rows come, by kind."""

    prefill: Array
    """[n], like `decode`"""
    decode: Array
    parts: Array
    """[n, KINDS]: shares of the total"""

    @property
    def total(self) -> Array:
        """[n]"""
        return self.prefill + self.decode


class RowsModel:
    """Forecasts how many rows come from queue and pace."""

    def __init__(self, prefill: lgb.Booster, decode: lgb.Booster) -> None:
        self.prefill, self.decode = prefill, decode

    @classmethod
    def fit(cls, samples: Samples, seed: int) -> RowsModel:
        """Learn from `samples`."""
        then = samples.future
        models = [
            trees.fit(samples.scalars, np.log1p(rows), rounds=100, seed=seed)
            for rows in (then.prefill_rows, then.decode_rows)
        ]
        return cls(*models)

    def forecast(self, scalars: Array) -> RowsForecast:
        """`scalars` [n, SCALARS]."""
        prefill = np.expm1(np.maximum(trees.predict(self.prefill, scalars), 0))
        decode = np.expm1(np.maximum(trees.predict(self.decode, scalars), 0))
        return split(prefill, decode, scalars)


def split(prefill: Array, decode: Array, scalars: Array) -> RowsForecast:
    """Which of the rows to come are known already."""
    queued = np.minimum(scalars[:, SCALARS.index("rows:queue_far")], prefill)
    running = np.minimum(scalars[:, SCALARS.index("rows:decode_near")], decode)
    parts = np.stack([queued, prefill - queued, running, decode - running], axis=1)
    return RowsForecast(prefill, decode, parts / np.maximum(prefill + decode, 1e-6)[:, None])


class Mixture:
    """Shares as a weighted sum of the sources, for each layer."""

    def __init__(self, weights: Array, static: Array) -> None:
        """`weights` [L, SOURCES]; `static` [L, E] are the shares over all the training data."""
        self.weights, self.static = weights, static

    @classmethod
    def fit(cls, samples: Samples, rows: RowsForecast) -> Mixture:
        """Learn from `samples`."""
        counts = samples.future.counts.sum(axis=0)
        static = (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).astype(np.float32)
        target = samples.future.shares
        unfitted = cls(np.ones((len(static), len(SOURCES)), np.float32), static)
        columns = unfitted._columns(samples.shares, rows)  # [n, J, L, E]
        weights = [
            nnls(
                columns[:, :, layer].transpose(0, 2, 1).reshape(-1, len(SOURCES)).astype(np.float64),
                target[:, layer].ravel().astype(np.float64),
            )[0]
            for layer in range(len(static))
        ]
        return cls(np.array(weights, np.float32), static)

    def forecast(self, shares: Array, rows: RowsForecast) -> Array:
        """`shares` [n, SHARES, L, E] -> [n, L, E]."""
        mixed = np.einsum("njle,lj->nle", self._columns(shares, rows), self.weights)
        return normalised(mixed)

    def _columns(self, shares: Array, rows: RowsForecast) -> Array:
        columns = np.empty((len(shares), len(SOURCES), *shares.shape[2:]), np.float32)
        for j, (kind, name) in enumerate(SOURCES):
            source = self.static if name == "static" else shares[:, SHARES.index(name)]
            columns[:, j] = rows.parts[:, kind, None, None] * source
        return columns


def normalised(shares: Array) -> Array:
    """`shares` [..., E] without what is negative, as sums of one; an even load where nothing is left."""
    kept = np.maximum(shares, 0)
    total = kept.sum(axis=-1, keepdims=True)
    even = np.float32(1 / shares.shape[-1])
    return np.where(total > 1e-6, kept / np.maximum(total, 1e-6), even).astype(np.float32)
