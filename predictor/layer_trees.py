"""One LightGBM model for each layer: what the mixture misses of every expert's share."""

from __future__ import annotations

from collections.abc import Sequence

import lightgbm as lgb
import numpy as np
import numpy.typing as npt

from predictor import trees
from predictor.features import SHARES
from predictor.mixture import normalised, queue_ahead
from predictor.rows_model import RowsForecast
from predictor.samples import Samples

Array = npt.NDArray[np.float32]

_MOST_ROWS = 60_000  # (moment, expert) pairs a layer learns from
_ROUNDS = 14
_INPUTS = [i for i, name in enumerate(SHARES) if not name.startswith("queue_")]


class LayerTrees:
    """Residuals of a first forecast, layer by layer."""

    def __init__(self, boosters: Sequence[lgb.Booster], above: Array, static: Array) -> None:
        """`above` [L, E, E] forecasts a layer's shares from those of the layer above; `static` [L, E]."""
        self.boosters, self.above, self.static = list(boosters), above, static

    @classmethod
    def fit(cls, samples: Samples, first: Array, rows: RowsForecast, static: Array, seed: int) -> LayerTrees:
        """Learn what `first` [n, L, E] misses."""
        target = samples.future.shares
        every = max(1, -(-len(samples) * target.shape[2] // _MOST_ROWS))
        model = cls([], _map_above(first, target), static)
        chosen = slice(None, None, every)
        queue = queue_ahead(samples.shares, rows.queued, rows.prefill)
        for layer in range(target.shape[1]):
            inputs = model._inputs(layer, samples.shares, first, queue, rows)[chosen]
            missed = (target - first)[chosen, layer].ravel()
            model.boosters.append(
                trees.fit(
                    inputs.reshape(len(missed), -1),
                    missed,
                    rounds=_ROUNDS,
                    seed=seed,
                    num_leaves=8,
                    objective="l1",
                    learning_rate=0.12,
                )
            )
        return model

    def forecast(self, shares: Array, first: Array, rows: RowsForecast) -> Array:
        """`shares` [n, SHARES, L, E] and a first forecast [n, L, E] -> [n, L, E]."""
        found = np.empty_like(first)
        queue = queue_ahead(shares, rows.queued, rows.prefill)
        for layer, booster in enumerate(self.boosters):
            inputs = self._inputs(layer, shares, first, queue, rows)
            missed = trees.predict(booster, inputs.reshape(-1, inputs.shape[-1]))
            found[:, layer] = first[:, layer] + missed.reshape(first[:, layer].shape)
        return normalised(found)

    def _inputs(self, layer: int, shares: Array, first: Array, queue: Array, rows: RowsForecast) -> Array:
        """[n, E, F]"""
        count, _, _, experts = shares.shape
        inputs = np.empty((count, experts, len(_INPUTS) + 10), np.float32)
        inputs[..., : len(_INPUTS)] = shares[:, _INPUTS, layer].transpose(0, 2, 1)
        inputs[..., -10] = queue[:, layer]
        inputs[..., -9] = first[:, layer]
        inputs[..., -8] = first[:, max(layer - 1, 0)] @ self.above[layer]
        inputs[..., -7] = self.static[layer]
        inputs[..., -6:-2] = rows.parts[:, None]
        inputs[..., -2] = np.log1p(rows.prefill)[:, None]
        inputs[..., -1] = np.log1p(rows.decode)[:, None]
        return inputs


def _map_above(first: Array, target: Array) -> Array:
    """Ridge maps [L, E, E] from the forecast of the layer above to a layer's shares; the first layer maps its own."""
    maps = np.empty((target.shape[1], target.shape[2], target.shape[2]), np.float32)
    for layer in range(target.shape[1]):
        above = first[:, max(layer - 1, 0)].astype(np.float64)
        gram = above.T @ above + 1e-2 * len(above) / above.shape[1] * np.eye(above.shape[1])
        maps[layer] = np.linalg.solve(gram, above.T @ target[:, layer])
    return maps
