"""The trained predictor: for each horizon the models, and the method each layer has chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from predictor.baselines import HistoryRidge, plain_forecasts
from predictor.choice import Choice
from predictor.features import Moment
from predictor.headroom import Headroom
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
    """One for each layer."""

    def candidates(self, scalars: Array, shares: Array) -> tuple[dict[str, Array], RowsForecast]:
        """Every method's forecast [n, L, E], from simple to elaborate, and the rows to come."""
        rows = self.rows.forecast(scalars)
        mixed = self.mixture.forecast(shares, rows)
        found = plain_forecasts(shares, self.mixture.static)
        found |= {"ridge": self.ridge.forecast(shares), "mixture": mixed}
        return {**found, "lightgbm": self.trees.forecast(shares, mixed, rows)}, rows

    def forecast(self, scalars: Array, shares: Array) -> Forecast:
        """`scalars` [n, SCALARS] and `shares` [n, SHARES, L, E] of n moments."""
        chosen, rows = self._chosen(scalars, shares)
        expected = chosen * (rows.total * self.top_k)[:, None, None]
        p50, p90 = self.headroom.quantiles(expected, scalars, rows)
        return Forecast(chosen, expected, p50, p90, rows.prefill, rows.decode)

    def _chosen(self, scalars: Array, shares: Array) -> tuple[Array, RowsForecast]:
        methods = {choice.method for choice in self.choices}
        rows = self.rows.forecast(scalars)
        found = plain_forecasts(shares, self.mixture.static)
        if "ridge" in methods:
            found["ridge"] = self.ridge.forecast(shares)
        if methods & {"mixture", "lightgbm"}:
            found["mixture"] = self.mixture.forecast(shares, rows)
        if "lightgbm" in methods:
            found["lightgbm"] = self.trees.forecast(shares, found["mixture"], rows)
        return np.stack([found[choice.method][:, layer] for layer, choice in enumerate(self.choices)], axis=1), rows


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
