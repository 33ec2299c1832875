"""Forecasts that anybody can make: what the models have to beat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import Ridge

from predictor.features import SHARES
from predictor.mixture import normalised
from predictor.samples import Samples

Array = npt.NDArray[np.float32]

PLAIN = {
    "persistence": "last",
    "average 16": "average:16",
    "average 64": "average:64",
    "average 256": "average:256",
    "look-ahead": "look_ahead",
}
"""Baseline -> the share it repeats; averages are exponential, with so many steps of half-life."""

_HISTORY = ("last", "look_ahead", "average:4", "average:16", "average:64", "average:256")


class HistoryRidge:
    """Linear regression on history alone, for each layer from the shares of all its experts and the layer above's."""

    def __init__(self, weights: Array, bias: Array) -> None:
        """`weights` [L, E, inputs], `bias` [L, E]."""
        self.weights, self.bias = weights, bias

    @classmethod
    def fit(cls, samples: Samples) -> HistoryRidge:
        """Learn from `samples`."""
        target = samples.future.shares
        fitted = [
            Ridge(alpha=1.0).fit(_inputs(samples.shares, layer), target[:, layer]) for layer in range(target.shape[1])
        ]
        weights = np.array([np.atleast_2d(model.coef_) for model in fitted], np.float32)
        return cls(weights, np.array([np.atleast_1d(model.intercept_) for model in fitted], np.float32))

    def forecast(self, shares: Array) -> Array:
        """`shares` [n, SHARES, L, E] -> [n, L, E]."""
        layers = range(shares.shape[2])
        found = [_inputs(shares, layer) @ self.weights[layer].T + self.bias[layer] for layer in layers]
        return normalised(np.stack(found, axis=1))


def plain_forecasts(shares: Array, static: Array) -> dict[str, Array]:
    """Baseline -> [n, L, E] of `shares` [n, SHARES, L, E]; `static` [L, E] is the mean over the training data."""
    found = {name: shares[:, SHARES.index(source)] for name, source in PLAIN.items()}
    return {**found, "static mean": np.broadcast_to(static, (len(shares), *static.shape))}


def _inputs(shares: Array, layer: int) -> Array:
    own = shares[:, [SHARES.index(name) for name in _HISTORY], layer]
    above = shares[:, SHARES.index("average:16"), max(layer - 1, 0)]
    return np.concatenate([own.reshape(len(shares), -1), above], axis=1)
