"""Quantiles of the rows each expert will get: how far a forecast may be exceeded."""

from __future__ import annotations

from collections.abc import Mapping

import lightgbm as lgb
import numpy as np
import numpy.typing as npt

from predictor import trees
from predictor.rows_model import RowsForecast
from predictor.samples import Samples

Array = npt.NDArray[np.float32]

LEVELS = (0.5, 0.9)
_GRID = 24  # sizes of forecasts between which factors are interpolated
_MOST_ROWS = 60_000
_KNOWN = (0.25, 0.75)  # parts of the rows that are known before: what divides three regimes
_LEAST_MOMENTS = 30  # of a regime, to be set right by itself


class Headroom:
    """Factors on the forecast rows of an expert, by what is known and by the size of the forecast.

    One quantile regression of log((rows + 1) / (forecast + 1)) for all layers, evaluated at a few sizes only, and a
    shift that makes the coverage right on the validation data (split conformal prediction): one for each layer and
    each of three regimes, by how much of what comes is known before.
    """

    def __init__(self, boosters: Mapping[float, lgb.Booster], shifts: Array) -> None:
        """`shifts` [regimes, L, LEVELS]"""
        self.boosters, self.shifts = dict(boosters), shifts

    @classmethod
    def fit(cls, samples: Samples, forecast: Array, rows: RowsForecast, seed: int) -> Headroom:
        """Learn from the rows `forecast` [n, L, E] of `samples`."""
        log_rows = np.log1p(forecast)
        ratio = np.log1p(samples.future.counts) - log_rows
        every = max(1, -(-ratio.size // _MOST_ROWS))
        known = _known(samples.scalars, rows)
        moment = np.repeat(np.arange(len(samples)), ratio[0].size)[::every]
        inputs = np.concatenate([log_rows.reshape(-1, 1)[::every], known[moment]], axis=1)
        target = ratio.ravel()[::every]
        boosters = {
            level: trees.fit(
                inputs, target, rounds=60, seed=seed, objective="quantile", alpha=level, num_leaves=8, lambda_l2=0.0
            )
            for level in LEVELS
        }
        return cls(boosters, np.zeros((len(_KNOWN) + 1, ratio.shape[1], len(LEVELS)), np.float32))

    def calibrate(self, samples: Samples, forecast: Array, rows: RowsForecast) -> None:
        """Shift the quantiles of each layer to what `samples`, not learned from, say."""
        self.shifts = np.zeros_like(self.shifts)
        quantiles = self.quantiles(forecast, samples.scalars, rows)
        regimes = _regimes(rows)
        for i, level in enumerate(LEVELS):
            missed = np.log1p(samples.future.counts) - np.log1p(quantiles[i])
            for regime in range(len(self.shifts)):
                own = regimes == regime
                alike = missed[own] if own.sum() >= _LEAST_MOMENTS else missed
                self.shifts[regime, :, i] = np.quantile(alike, level, axis=(0, 2))

    def quantiles(self, forecast: Array, scalars: Array, rows: RowsForecast, shift: Array | None = None) -> Array:
        """Rows [n, L, E] at each level: [LEVELS, n, L, E], rising; `shift` [LEVELS, L] moves their logarithms."""
        log_rows = np.log1p(forecast)
        known = _known(scalars, rows)
        found = np.empty((len(LEVELS), *forecast.shape), np.float32)
        shifts = self.shifts[_regimes(rows)]  # [n, L, LEVELS]
        if shift is not None:
            shifts = shifts + shift.T
        for n in range(len(forecast)):
            grid = np.linspace(log_rows[n].min(), log_rows[n].max() + 1e-3, _GRID, dtype=np.float32)
            inputs = np.concatenate([grid[:, None], np.broadcast_to(known[n], (_GRID, known.shape[1]))], axis=1)
            for i, level in enumerate(LEVELS):
                factor = np.interp(log_rows[n], grid, trees.predict(self.boosters[level], inputs))
                found[i, n] = np.expm1(log_rows[n] + factor + shifts[n, :, i, None])
        return np.maximum.accumulate(np.maximum(found, 0), axis=0)


def _known(scalars: Array, rows: RowsForecast) -> Array:
    """What tells how sure the totals are."""
    return np.concatenate([scalars, rows.parts, np.log1p(np.stack([rows.prefill, rows.decode], axis=1))], axis=1)


def _regimes(rows: RowsForecast) -> npt.NDArray[np.int64]:
    """[n]: the number of each moment's regime."""
    return np.asarray(np.digitize(rows.parts[:, 0] + rows.parts[:, 2], _KNOWN), np.int64)
