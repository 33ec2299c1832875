"""What a forecaster learns from its own forecasts, once their horizons have passed: whom to trust, and how much room
to leave.

Live and in evaluation the same: nothing is used before it has happened.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from predictor.choice import share_errors, trust_of
from predictor.headroom import LEVELS
from predictor.model import Candidates, Forecast, HorizonModel
from predictor.samples import Samples

Array = npt.NDArray[np.float32]

_STEP = 0.15  # how far a whole horizon that missed all moves a quantile, as a logarithm of rows
_FARTHEST = 2.0
_CHUNK = 256  # moments that methods are asked about at a time


class Adaptation:
    """A trained model of one horizon, and what was learned since."""

    def __init__(self, model: HorizonModel) -> None:
        self._model = model
        self.trust = trust_of(model.choices)
        self._shift = np.zeros((len(LEVELS), len(model.choices)), np.float32)

    def forecast(self, candidates: Candidates) -> Forecast:
        """What is expected of one moment."""
        shares = self.trust.blend(candidates.shares)
        return self._model.finish(candidates, shares, self._shift)

    def learn(self, candidates: Candidates, told: Forecast, actual: Array, credit: float) -> None:
        """Judge what was `told` by the rows [L, E] that came.

        `credit`: what part of a horizon has passed between the forecast before and this one, 0 to 1.
        """
        total = actual.sum(axis=1, keepdims=True)
        shares = actual / np.maximum(total, 1)
        some = total[:, 0] > 0
        errors = share_errors(candidates.shares[:, 0], shares)
        self.trust.learn(np.where(some, errors, 0), credit)
        for i, (level, quantile) in enumerate(zip(LEVELS, (told.p50, told.p90), strict=True)):
            missed = (actual > quantile[0]).mean(axis=1) - (1 - level)
            self._shift[i] += np.where(some, _STEP * credit * missed, 0)
        self._shift = self._shift.clip(-_FARTHEST, _FARTHEST)


@dataclass(frozen=True)
class Told:
    """What was forecast of n moments, each with what was learned before it."""

    shares: Array
    """[n, L, E], as `rows` and `p90`"""
    rows: Array
    p90: Array
    candidates: Candidates
    adaptation: Adaptation
    """As it was after the last."""


def follow(model: HorizonModel, samples: Samples) -> Told:
    """Forecast each of the `samples` of one recording, in order of time, learning from those that have ended."""
    adaptation = Adaptation(model)
    chunks = [slice(start, start + _CHUNK) for start in range(0, len(samples), _CHUNK)]
    found = [model.candidates(samples.scalars[chunk], samples.shares[chunk]) for chunk in chunks]
    candidates = Candidates.concatenate(found)
    told: list[Forecast] = []
    judged = 0
    for moment in range(len(samples)):
        while judged < moment and samples.ends[judged] < samples.steps[moment]:
            before = samples.steps[judged - 1] if judged else -np.inf
            length = samples.ends[judged] - samples.steps[judged]
            credit = min(1.0, float((samples.steps[judged] - before) / length))
            adaptation.learn(candidates.take(judged), told[judged], samples.future.counts[judged], credit)
            judged += 1
        told.append(adaptation.forecast(candidates.take(moment)))
    shares, rows, p90 = (np.concatenate([getattr(one, name) for one in told]) for name in ("shares", "rows", "p90"))
    return Told(shares, rows, p90, candidates, adaptation)
