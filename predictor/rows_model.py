"""How many rows come: the scheduler's arithmetic, and how far trees have learned to trust it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import lightgbm as lgb
import numpy as np
import numpy.typing as npt

from predictor import trees
from predictor.batch_arithmetic import Pace, Rows, rows_to_come
from predictor.features import SCALARS
from predictor.horizon import Horizon
from predictor.load_step import QUEUE_SPANS
from predictor.samples import Samples

Array = npt.NDArray[np.float32]

_QUEUED = [SCALARS.index(f"rows:queue_{span}") for span in QUEUE_SPANS]
_BOUND = 0.25  # logarithm of the most by which trees may correct the arithmetic
_ROUNDS = 40


@dataclass(frozen=True)
class RowsForecast:
    """How many rows come, by kind."""

    prefill: Array
    """[n], like `decode`"""
    decode: Array
    parts: Array
    """[n, KINDS]: shares of the total"""
    queued: Array
    """[n, QUEUE_SPANS]: tokens that wait within each span"""

    def take(self, chosen: slice) -> RowsForecast:
        """That of some of the moments."""
        arrays = (self.prefill, self.decode, self.parts, self.queued)
        return RowsForecast(*(array[chosen] for array in arrays))

    @classmethod
    def concatenate(cls, parts: Sequence[RowsForecast]) -> RowsForecast:
        """Those of several samples."""
        names = ("prefill", "decode", "parts", "queued")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    @property
    def total(self) -> Array:
        """[n]"""
        return self.prefill + self.decode


class RowsModel:
    """Forecasts how many rows come from queue and pace."""

    def __init__(self, horizon: Horizon, pace: Pace, prefill: lgb.Booster, decode: lgb.Booster) -> None:
        """The trees forecast by what factor (its logarithm) the arithmetic errs."""
        self.horizon, self.pace, self.prefill, self.decode = horizon, pace, prefill, decode

    @classmethod
    def fit(cls, samples: Samples, horizon: Horizon, seed: int) -> RowsModel:
        """Learn from `samples`, which are of `horizon`."""
        pace = Pace.fit(samples.scalars)
        come = rows_to_come(samples.scalars, horizon, pace)
        inputs = _inputs(samples.scalars, come)
        then = (samples.future.prefill_rows, samples.future.decode_rows)
        models = [
            trees.fit(inputs, _error(rows, expected), rounds=_ROUNDS, seed=seed, num_leaves=8, objective="l1")
            for rows, expected in zip(then, (come.prefill, come.running + come.fresh), strict=True)
        ]
        return cls(horizon, pace, *models)

    def forecast(self, scalars: Array) -> RowsForecast:
        """`scalars` [n, SCALARS]."""
        come = rows_to_come(scalars, self.horizon, self.pace)
        inputs = _inputs(scalars, come)
        more, longer = (np.exp(trees.predict(b, inputs).clip(-_BOUND, _BOUND)) for b in (self.prefill, self.decode))
        return _by_kind(scalars, come.prefill * more, come.running * longer, come.fresh * longer)

    def told(self, scalars: Array, prefill: Array, decode: Array) -> RowsForecast:
        """What one would forecast who knows how many rows of prompts and of answers come [n]."""
        come = rows_to_come(scalars, self.horizon, self.pace)
        factor = decode / np.maximum(come.running + come.fresh, 1e-6)
        return _by_kind(scalars, prefill, come.running * factor, come.fresh * factor)


def _by_kind(
    scalars: Array,
    prefill: npt.NDArray[np.floating],
    running: npt.NDArray[np.floating],
    fresh: npt.NDArray[np.floating],
) -> RowsForecast:
    """Which of the rows to come are known already."""
    waits = scalars[:, SCALARS.index("waiting_tokens")] + scalars[:, SCALARS.index("prompt_left")]
    queued = np.minimum(waits, prefill)
    rows = np.stack([queued, prefill - queued, running, fresh], axis=1)
    parts = rows / np.maximum(rows.sum(axis=1, keepdims=True), 1e-6)
    arrays = (prefill, running + fresh, parts, scalars[:, _QUEUED])
    return RowsForecast(*(array.astype(np.float32) for array in arrays))


def _inputs(scalars: Array, come: Rows) -> Array:
    """What may tell how far the arithmetic errs [n, F]: parts of what a step can hold, so that sizes do not matter."""

    def scalar(name: str) -> Array:
        return scalars[:, SCALARS.index(name)]

    budget, places = np.maximum(scalar("token_budget"), 1), np.maximum(scalar("max_sequences"), 1)
    lately = [scalar(f"{kind}:{steps}") / budget for kind in ("prefill_rows", "arrived") for steps in (16, 64, 256)]
    waits = scalar("waiting_tokens") + scalar("prompt_left")
    inputs = [
        *lately,
        *(scalar(f"decode_rows:{steps}") / places for steps in (16, 64, 256)),
        scalar("running") / places,
        np.log1p(scalar("waiting") / places),
        np.log1p(waits / budget),
        np.log1p(come.prefill / budget),
        np.log1p((come.running + come.fresh) / places),
        come.fresh / np.maximum(come.running + come.fresh, 1e-6),
        (waits / np.maximum(come.prefill, 1)).clip(0, 4),
    ]
    return np.stack(inputs, axis=1).astype(np.float32)


def _error(rows: Array, expected: npt.NDArray[np.float64]) -> Array:
    """Of `expected` rows, as a logarithm; not much more than what may be corrected, else it would drown the rest."""
    return np.log((rows + 10) / (expected + 10)).clip(-2 * _BOUND, 2 * _BOUND).astype(np.float32)
