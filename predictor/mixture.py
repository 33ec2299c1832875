"""The analytic forecast: which rows come, and how each kind of them is routed.

Rows of the horizon are prompt rows already queued, prompt rows of requests nobody knows yet, rows that running
sequences decode and rows of answers that have not begun. How many of each is forecast from the queue and the pace; each
kind's shares come from the sources that know most about it. How far each source is trusted is fitted (non-negative
least squares), layer by layer: a collapsed layer needs other weights than one that follows the text.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from predictor.features import SHARES
from predictor.load_step import QUEUE_SPANS
from predictor.rows_model import RowsForecast
from predictor.samples import Samples

Array = npt.NDArray[np.float32]

_REWEIGHTED, _LEAST_ERROR = 4, 0.03
_MOST_FITTED = 120_000  # (moment, expert) pairs

KINDS = ("queued", "unknown prompts", "running answers", "new answers")
SOURCES: tuple[tuple[int, str], ...] = (
    (0, "queue"),
    (0, "prompt_own"),
    (1, "prefill:16"),
    (1, "prefill:64"),
    (1, "prefill:256"),
    (1, "prefill:1024"),
    (1, "queue_64"),
    (1, "static"),
    (2, "decode_near"),
    (2, "decode:16"),
    (2, "decode:64"),
    (3, "decode_far"),
    (3, "decode:64"),
    (3, "decode:256"),
    (3, "decode:1024"),
    (3, "queue"),
    (3, "static"),
)
"""(kind of rows, estimate of its shares); ``queue`` is the part of the queue that will be computed, `queue_ahead`."""


_QUEUE_SHARES = [SHARES.index(f"queue_{span}") for span in QUEUE_SPANS]


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
        every = max(1, -(-len(samples) * static.shape[1] // _MOST_FITTED))
        target = samples.future.shares[::every]
        unfitted = cls(np.ones((len(static), len(SOURCES)), np.float32), static)
        columns = unfitted._columns(samples.shares[::every], rows.take(every))  # [n, J, L, E]
        weights = [_least_absolute(columns[:, :, layer], target[:, layer]) for layer in range(len(static))]
        return cls(np.array(weights, np.float32), static)

    def forecast(self, shares: Array, rows: RowsForecast) -> Array:
        """`shares` [n, SHARES, L, E] -> [n, L, E]."""
        mixed = np.einsum("njle,lj->nle", self._columns(shares, rows), self.weights)
        return normalised(mixed)

    def _columns(self, shares: Array, rows: RowsForecast) -> Array:
        queue = queue_ahead(shares, rows)
        columns = np.empty((len(shares), len(SOURCES), *shares.shape[2:]), np.float32)
        for j, (kind, name) in enumerate(SOURCES):
            own = {"queue": queue, "static": self.static}.get(name)
            source = shares[:, SHARES.index(name)] if own is None else own
            np.multiply(rows.parts[:, kind, None, None], source, out=columns[:, j])
        return columns


def queue_ahead(shares: Array, rows: RowsForecast) -> Array:
    """Shares [n, L, E] of as many of the queue's first tokens as prompt rows are forecast.

    What lies between the ends of two spans is taken to be alike: rows are linear in between.
    """
    ends = np.concatenate([np.zeros((len(shares), 1), np.float32), rows.queued], axis=1)
    inside = (np.minimum(rows.prefill[:, None], ends[:, 1:]) - ends[:, :-1]).clip(0) / np.maximum(np.diff(ends), 1)
    # Rows up to the forecast are sums of differences of rows up to the ends of spans: one weight for each span.
    weights = inside.copy()
    weights[:, :-1] -= inside[:, 1:]
    weights *= rows.queued
    silent = weights.sum(axis=1) <= 0
    weights[silent] = np.eye(len(QUEUE_SPANS), dtype=np.float32)[-1]  # what stands in for an empty queue
    return normalised(np.einsum("nj,njle->nle", weights.astype(np.float32), shares[:, _QUEUE_SHARES]))


def _least_absolute(columns: Array, target: Array) -> npt.NDArray[np.float64]:
    """Non-negative weights [J] of `columns` [n, J, E] that bring their sum near `target` [n, E].

    The error counts as it is, not squared (iteratively reweighted least squares): moments at which little can be known
    would else drown those at which much is.
    """
    inputs = columns.transpose(0, 2, 1).reshape(-1, columns.shape[1]).astype(np.float64)
    goal = target.ravel().astype(np.float64)
    weights = nnls(inputs, goal)[0]
    for _ in range(_REWEIGHTED):
        error = np.abs(inputs @ weights - goal).reshape(target.shape).mean(axis=1)
        scale = np.repeat(1 / np.sqrt(np.maximum(error, _LEAST_ERROR / target.shape[1])), target.shape[1])
        weights = nnls(inputs * scale[:, None], goal * scale)[0]
    return np.asarray(weights, np.float64)


def normalised(shares: Array) -> Array:
    """`shares` [..., E] without what is negative, as sums of one; an even load where nothing is left."""
    kept = np.maximum(shares, 0)
    total = kept.sum(axis=-1, keepdims=True)
    even = np.float32(1 / shares.shape[-1])
    return np.where(total > 1e-6, kept / np.maximum(total, 1e-6), even).astype(np.float32)
