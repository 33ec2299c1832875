"""How many rows come: the scheduler's arithmetic, and what trees have learned about where it errs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import lightgbm as lgb
import numpy as np
import numpy.typing as npt

from predictor import trees
from predictor.features import SCALARS
from predictor.horizon import Horizon
from predictor.load_step import QUEUE_SPANS
from predictor.samples import Samples

Array = npt.NDArray[np.float32]

_QUEUED = [SCALARS.index(f"rows:queue_{span}") for span in QUEUE_SPANS]


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

    def take(self, every: int) -> RowsForecast:
        """Every so-manieth moment of it."""
        arrays = (self.prefill, self.decode, self.parts, self.queued)
        return RowsForecast(*(array[::every] for array in arrays))

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

    def __init__(self, horizon: Horizon, prefill: lgb.Booster, decode: lgb.Booster) -> None:
        """The trees forecast by what factor (its logarithm) `by_arithmetic` errs."""
        self.horizon, self.prefill, self.decode = horizon, prefill, decode

    @classmethod
    def fit(cls, samples: Samples, horizon: Horizon, seed: int) -> RowsModel:
        """Learn from `samples`, which are of `horizon`."""
        then = (samples.future.prefill_rows, samples.future.decode_rows)
        models = [
            trees.fit(samples.scalars, np.log1p(rows) - np.log1p(expected), rounds=100, seed=seed)
            for rows, expected in zip(then, by_arithmetic(samples.scalars, horizon), strict=True)
        ]
        return cls(horizon, *models)

    def forecast(self, scalars: Array) -> RowsForecast:
        """`scalars` [n, SCALARS]."""
        prefill, decode = (
            np.maximum(np.expm1(np.log1p(expected) + trees.predict(booster, scalars)), 0).astype(np.float32)
            for expected, booster in zip(by_arithmetic(scalars, self.horizon), (self.prefill, self.decode), strict=True)
        )
        return split(prefill, decode, scalars)


def by_arithmetic(scalars: Array, horizon: Horizon) -> tuple[Array, Array]:
    """Prompt and answer rows [n] if prompts go on to arrive as they did, and the scheduler fills its steps.

    While more waits than the horizon's steps can take, prompts get what decoding sequences leave of each budget.
    """

    def scalar(name: str) -> Array:
        return scalars[:, SCALARS.index(name)]

    steps = horizon.steps or horizon.seconds / np.maximum(scalar("step_s"), 1e-4)
    waits = scalar("waiting_tokens") + scalar("prompt_left")
    room = steps * np.maximum(scalar("token_budget") - scalar("running"), 0)
    prefill = np.minimum(waits + steps * scalar("prefill_rows:64"), room)
    return prefill.astype(np.float32), (steps * scalar("decode_rows:16")).astype(np.float32)


def split(prefill: Array, decode: Array, scalars: Array) -> RowsForecast:
    """Which of the rows to come are known already."""
    queued = np.minimum(scalars[:, _QUEUED[-1]], prefill)
    running = np.minimum(scalars[:, SCALARS.index("rows:decode_near")], decode)
    parts = np.stack([queued, prefill - queued, running, decode - running], axis=1)
    total = np.maximum(prefill + decode, 1e-6)
    return RowsForecast(prefill, decode, parts / total[:, None], scalars[:, _QUEUED])
