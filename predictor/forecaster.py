"""The live side: steps in, forecasts out, with whatever model there is at the moment."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from predictor.adaptation import Adaptation
from predictor.choice import Choice, share_errors
from predictor.features import SCALARS, SHARES, History, Moment
from predictor.horizon import Horizon
from predictor.load_step import LoadStep
from predictor.model import Candidates, Forecast, HorizonModel, LoadModel
from predictor.shape import ModelShape

_MOST_OPEN = 32


@dataclass(frozen=True, slots=True)
class _Open:
    """A forecast whose horizon has not passed."""

    candidates: Candidates
    forecast: Forecast
    after: int
    """Steps seen when it was made."""
    time_s: float
    counts: npt.NDArray[np.int64]
    """[L, E]: rows seen when it was made"""


class _Following:
    """One horizon's model, its open forecasts and what was learned from those that have ended."""

    def __init__(self, model: HorizonModel, horizon: Horizon) -> None:
        self.adaptation = Adaptation(model)
        self._model, self._horizon = model, horizon
        self._open: deque[_Open] = deque()
        self._judged = -np.inf  # steps seen when the forecast that was judged last was made

    def forecast(self, moment: Moment, steps: int, time_s: float, counts: npt.NDArray[np.int64]) -> Forecast:
        """What is expected after so many steps; it is judged later, unless many are open."""
        candidates = self._model.candidates(moment.scalars[None], moment.shares[None])
        forecast = self.adaptation.forecast(candidates)
        if len(self._open) < _MOST_OPEN and (not self._open or self._open[-1].after < steps):
            self._open.append(_Open(candidates, forecast, steps, time_s, counts.copy()))
        return forecast

    def learn(self, steps: int, next_s: float, counts: npt.NDArray[np.int64]) -> None:
        """Judge the forecasts that ended: `steps` were seen, with `counts` rows, and the next one ends at `next_s`."""
        while self._open and self._ended(self._open[0], steps, next_s):
            ended = self._open.popleft()
            credit = min(1.0, (ended.after - self._judged) / max(steps - ended.after, 1))
            self._judged = ended.after
            came = (counts - ended.counts).astype(np.float32)
            self.adaptation.learn(ended.candidates, ended.forecast, came, credit)

    def _ended(self, made: _Open, steps: int, next_s: float) -> bool:
        if self._horizon.steps:
            return steps - made.after >= self._horizon.steps
        return made.time_s + self._horizon.seconds < next_s


class Forecaster:
    """Follows the load of one model. Not thread-safe, but `model` may be replaced between two calls (hot swap).

    It learns from its own forecasts, when their horizons have passed, whom to trust and how much room to leave.
    """

    def __init__(self, shape: ModelShape, model: LoadModel | None = None) -> None:
        """Raise ValueError for a model of another shape."""
        self.shape = shape
        self._history = History(shape)
        self._model: LoadModel | None = None
        self._following: dict[Horizon, _Following] = {}
        self._counts = np.zeros((len(shape.layers), shape.experts), np.int64)
        self._time_s = 0.0
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
        horizons = {} if model is None else model.horizons
        self._following = {horizon: _Following(part, horizon) for horizon, part in horizons.items()}

    def choices(self, horizon: Horizon) -> tuple[Choice, ...]:
        """For each layer what carries the forecast now, and why; nothing where no model forecasts `horizon`."""
        following = self._following.get(horizon)
        return () if following is None else following.adaptation.trust.choices()

    def observe(self, step: LoadStep) -> None:
        """Add a step of the load stream."""
        for following in self._following.values():
            following.learn(self.steps, step.time_s, self._counts)
        self._history.observe(step)
        self._counts += step.prefill_counts
        self._counts += step.decode_counts
        self._time_s = step.time_s
        self.steps += 1

    def forecast(self, horizon: Horizon) -> Forecast:
        """What is expected next: arrays of one moment. Before the first step: no rows, evenly spread."""
        if not self.steps:
            return _nothing(self.shape)
        moment = self._history.moment()
        if horizon in self._following:
            return self._following[horizon].forecast(moment, self.steps, self._time_s, self._counts)
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
