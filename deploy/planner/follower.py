"""One gateway's load: forecast, and compared with what then came. Pure: time is the gateway's, told by its steps."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placement.forecast import LayerForecast
from predictor.choice import Choice
from predictor.forecaster import Forecaster, forecast_error
from predictor.horizon import Horizon
from predictor.load_step import LoadStep
from predictor.model import Forecast, LoadModel
from predictor.retraining import DriftWatch
from predictor.shape import ModelShape

_MEMORY = 50.0
"""Forecasts that count for the mean error."""
_NO_MODEL = "average: no predictor is trained yet"
_OTHER_HORIZON = "average: the predictor was trained for other horizons"


@dataclass(frozen=True, slots=True)
class _Open:
    """A forecast whose horizon has not passed."""

    forecast: Forecast
    until_s: float
    counts: npt.NDArray[np.int64]
    """[L, E]: rows that came so far"""


class Follower:
    """Follows the steps of one gateway. Forecasts look `horizon_s` seconds ahead."""

    def __init__(self, shape: ModelShape, horizon_s: float, model: LoadModel | None) -> None:
        """Raise ValueError for a model of another shape."""
        self.shape = shape
        self._horizon = Horizon(seconds=horizon_s)
        self._forecaster = Forecaster(shape)
        self._open: deque[_Open] = deque()
        self._time_s = 0.0
        self._forecast_at = -1
        self.latest: Forecast | None = None
        """What was last expected: arrays of one moment."""
        self._last: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]] | None = None
        self._errors = np.full(len(shape.layers), np.nan)
        self.use(model)

    @property
    def steps(self) -> int:
        """How many it has seen."""
        return self._forecaster.steps

    @property
    def errors(self) -> npt.NDArray[np.float64]:
        """[L]: mean error of the latest forecasts of each layer; NaN where none could be judged."""
        return self._errors

    @property
    def drift(self) -> float:
        """The recent error as a multiple of what the model's training promised."""
        return self._drift.ratio

    def use(self, model: LoadModel | None) -> None:
        """Forecast with `model` from now on."""
        self._forecaster.use(model)
        promised = [choice.errors[choice.method] for choice in self._choices()]
        self._drift = DriftWatch(float(np.mean(promised)) if promised else np.inf)

    def look(self, horizon_s: float) -> None:
        """Forecast so far ahead from now on; forecasts of the other horizon are not judged any more."""
        self._horizon = Horizon(seconds=horizon_s)
        self._open.clear()
        self.latest = self._last = None
        self._errors[:] = np.nan
        self.use(self._forecaster.model)

    def observe(self, step: LoadStep) -> None:
        """Add a step, and judge the forecasts whose horizons it ends."""
        while self._open and self._open[0].until_s < step.time_s:
            self._judge(self._open.popleft())
        for pending in self._open:
            pending.counts[:] += step.prefill_counts
            pending.counts[:] += step.decode_counts
        self._forecaster.observe(step)
        self._time_s = step.time_s

    def forecast(self) -> list[LayerForecast]:
        """What is expected now, layer by layer; it is judged later, unless nothing has come since the one before."""
        forecast = self.latest = self._forecaster.forecast(self._horizon)
        if self.steps and self.steps != self._forecast_at:
            counts = np.zeros((len(self.shape.layers), self.shape.experts), np.int64)
            self._open.append(_Open(forecast, self._time_s + self._horizon.seconds, counts))
            self._forecast_at = self.steps
        return [self._layer(place, forecast) for place in range(len(self.shape.layers))]

    def _judge(self, ended: _Open) -> None:
        errors = forecast_error(ended.forecast, ended.counts.astype(np.int32))
        first = np.isnan(self._errors)
        mixed = self._errors + (errors - self._errors) / _MEMORY
        self._errors = np.where(np.isnan(errors), self._errors, np.where(first, errors, mixed))
        self._last = ended.forecast.shares[0], ended.counts
        if np.isfinite(errors).any():
            self._drift.observe(float(np.nanmean(errors)))

    def _choices(self) -> tuple[Choice, ...]:
        model = self._forecaster.model
        if model is None or self._horizon not in model.horizons:
            return ()
        return model.horizons[self._horizon].choices

    def _layer(self, place: int, forecast: Forecast) -> LayerForecast:
        choices = self._choices()
        if choices:
            method, reason = choices[place].method, choices[place].reason
        else:
            method, reason = "average", _NO_MODEL if self._forecaster.model is None else _OTHER_HORIZON
        return LayerForecast(
            layer=self.shape.layers[place],
            method=method,
            reason=reason,
            expected=np.round(forecast.rows[0, place].astype(float), 1).tolist(),
            p90=np.round(forecast.p90[0, place].astype(float), 1).tolist(),
            forecast=[] if self._last is None else np.round(self._last[0][place].astype(float), 4).tolist(),
            actual=[] if self._last is None else self._last[1][place].tolist(),
            error=None if np.isnan(self._errors[place]) else round(float(self._errors[place]), 4),
        )
