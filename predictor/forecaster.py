"""The live side: steps in, forecasts out, with whatever model there is at the moment."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from predictor.choice import share_errors
from predictor.features import SCALARS, SHARES, History, Moment
from predictor.horizon import Horizon
from predictor.load_step import LoadStep
from predictor.model import Forecast, LoadModel
from predictor.shape import ModelShape


class Forecaster:
    """Follows the load of one model. Not thread-safe, but `model` may be replaced between two calls (hot swap)."""

    def __init__(self, shape: ModelShape, model: LoadModel | None = None) -> None:
        """Raise ValueError for a model of another shape."""
        self.shape = shape
        self._history = History(shape)
        self._model: LoadModel | None = None
        self.steps = 0
        """How many it has seen."""
        self.use(model)

    @property
    def model(self) -> LoadModel | None:
        """What it forecasts with; None: the safe default, an average with much room above it."""
        return self._model

    def use(self, model: LoadModel | None) -> None:
        """Forecast with `model` from now on; raise ValueError for one of another shape."""
        if model is not None and model.shape != self.shape:
            raise ValueError(f"this predictor was trained for {model.shape}, and {self.shape} is served")
        self._model = model

    def observe(self, step: LoadStep) -> None:
        """Add a step of the load stream."""
        self._history.observe(step)
        self.steps += 1

    def forecast(self, horizon: Horizon) -> Forecast:
        """What is expected next: arrays of one moment. Before the first step: no rows, evenly spread."""
        if not self.steps:
            return _nothing(self.shape)
        moment = self._history.moment()
        if self._model is not None and horizon in self._model.horizons:
            return self._model.forecast(horizon, [moment])
        return default_forecast(self.shape, horizon, moment)


def default_forecast(shape: ModelShape, horizon: Horizon, moment: Moment) -> Forecast:
    """What to expect before anything was learned: the shares and the pace of the last 64 steps, and wide margins."""
    scalar = dict(zip(SCALARS, moment.scalars.tolist(), strict=True))
    steps = horizon.steps or horizon.seconds / max(scalar["step_s"], 1e-4)
    prefill, decode = steps * scalar["prefill_rows:64"], steps * scalar["decode_rows:64"]
    shares = moment.shares[SHARES.index("average:64")][None]
    rows = shares * np.float32((prefill + decode) * shape.top_k)
    p90 = 1.5 * rows + 2 * np.sqrt(rows)
    return Forecast(shares, rows, rows, p90, np.array([prefill], np.float32), np.array([decode], np.float32))


def forecast_error(forecast: Forecast, actual: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Half the L1 distance of shares of one moment's forecast from `actual` rows [L, E], for each layer: [L].

    NaN for layers without rows: nothing can be said of them.
    """
    total = actual.sum(axis=1, keepdims=True)
    errors = share_errors(forecast.shares, (actual / np.maximum(total, 1))[None].astype(np.float32))[0]
    return np.where(total[:, 0] > 0, errors, np.nan)


def _nothing(shape: ModelShape) -> Forecast:
    size = (1, len(shape.layers), shape.experts)
    zeros, none = np.zeros(size, np.float32), np.zeros(1, np.float32)
    return Forecast(np.full(size, 1 / shape.experts, np.float32), zeros, zeros, zeros, none, none)
