"""The trained predictor: for each horizon the models, and the method each layer has chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from predictor.baselines import HistoryRidge, plain_forecasts
from predictor.choice import METHODS, Choice, trust_of
from predictor.features import Moment
from predictor.headroom import LEVELS, Headroom
from predictor.horizon import Horizon
from predictor.layer_trees import LayerTrees
from predictor.mixture import Mixture
from predictor.rows_model import RowsForecast, RowsModel
from predictor.shape import ModelShape

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of n moments' horizons. Rows of a layer are (token, expert) pairs: top-k for each token."""

    shares: Array
    """[n, L, E]: of each layer's rows; non-negative, sums of one"""
    rows: Array
    """[n, L, E]: the mean"""
    p50: Array
    """[n, L, E]: rows that are exceeded half of the time"""
    p90: Array
    """[n, L, E]: rows that are exceeded one time in ten"""
    prefill_rows: Array
    """[n]: tokens of prompts computed, as `decode_rows` of answers"""
    decode_rows: Array


@dataclass(frozen=True, slots=True)
class Candidates:
    """What every method says of n moments."""

    shares: Array
    """[METHODS, n, L, E]"""
    rows: RowsForecast
    scalars: Array
    """[n, SCALARS]"""

    def take(self, moment: int) -> Candidates:
        """That of one moment."""
        one = slice(moment, moment + 1)
        return Candidates(self.shares[:, one], self.rows.take(one), self.scalars[one])

    @classmethod
    def concatenate(cls, parts: Sequence[Candidates]) -> Candidates:
        """Those of several moments after one another."""
        shares, scalars = np.concatenate([p.shares for p in parts], axis=1), np.concatenate([p.scalars for p in parts])
        return cls(shares, RowsForecast.concatenate([part.rows for part in parts]), scalars)


@dataclass(frozen=True)
class HorizonModel:
    """Everything that forecasts one horizon."""

    top_k: int
    rows: RowsModel
    ridge: HistoryRidge
    mixture: Mixture
    trees: LayerTrees
    headroom: Headroom
    choices: tuple[Choice, ...]
    """One for each layer, by validation."""

    def candidates(self, scalars: Array, shares: Array) -> Candidates:
        """What every method says of n moments: `scalars` [n, SCALARS] and `shares` [n, SHARES, L, E]."""
        rows = self.rows.forecast(scalars)
        mixed = self.mixture.forecast(shares, rows)
        found = plain_forecasts(shares, self.mixture.static)
        found |= {"mixture": mixed, "lightgbm": self.trees.forecast(shares, mixed, rows)}
        return Candidates(np.stack([found[method] for method in METHODS]), rows, scalars)

    def forecast(self, scalars: Array, shares: Array) -> Forecast:
        """What is expected of n moments by one who has learned nothing since the training."""
        candidates = self.candidates(scalars, shares)
        shift = np.zeros((len(LEVELS), len(self.choices)), np.float32)
        return self.finish(candidates, trust_of(self.choices).blend(candidates.shares), shift)

    def finish(self, candidates: Candidates, shares: Array, shift: Array) -> Forecast:
        """The forecast of moments whose `shares` [n, L, E] are settled, its quantiles moved by `shift` [LEVELS, L]."""
        rows = candidates.rows
        expected = shares * (rows.total * self.top_k)[:, None, None]
        p50, p90 = self.headroom.quantiles(expected, candidates.scalars, rows, shift)
        return Forecast(shares, expected, p50, p90, rows.prefill, rows.decode)


@dataclass(frozen=True)
class LoadModel:
    """A trained predictor of one model's load."""

    shape: ModelShape
    seed: int
    trained_steps: int
    horizons: Mapping[Horizon, HorizonModel]

    def forecast(self, horizon: Horizon, moments: Sequence[Moment]) -> Forecast:
        """What is expected after each of `moments`; raise ValueError for a horizon that was not trained."""
        if horizon not in self.horizons:
            known = ", ".join(map(str, self.horizons))
            raise ValueError(f"no model for a horizon of {horizon}: this one was trained for {known}")
        scalars = np.array([moment.scalars for moment in moments], np.float32)
        shares = np.array([moment.shares for moment in moments], np.float32)
        return self.horizons[horizon].forecast(scalars, shares)
