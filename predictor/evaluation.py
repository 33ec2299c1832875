"""How good forecasts are: error, recall, coverage and time against every baseline, the noise floor beside them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from predictor.adaptation import Told, follow
from predictor.baselines import PLAIN, plain_forecasts
from predictor.choice import METHODS, Choice, share_errors
from predictor.horizon import Horizon
from predictor.mixture import normalised
from predictor.model import HorizonModel, LoadModel
from predictor.records import Records
from predictor.samples import Samples, concatenate, sample

Array = npt.NDArray[np.float32]

BASELINES = (*PLAIN, "static mean", "ridge")
HOTTEST = 2
_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Evaluation:
    """One horizon's figures; all errors are half the L1 distance of shares, per layer [L]."""

    horizon: Horizon
    layers: tuple[int, ...]
    moments: int
    errors: Mapping[str, npt.NDArray[np.float64]]
    """By method: the baselines, ``mixture``, ``lightgbm``; ``chosen``, what the layers make of these; ``oracle rows``,
    the mixture of one who knows how many prompt and answer rows will come; ``oracle tokens``, where recorded: the
    affinity of one who knows all tokens"""
    recall: Mapping[str, npt.NDArray[np.float64]]
    """Of the layer's two hottest experts, by method"""
    coverage: npt.NDArray[np.float64]
    """[L]: how often an expert's rows stayed within p90"""
    floor: npt.NDArray[np.float64]
    """[L]: the error of a forecaster who knows every expert's true probability, and not the tokens"""
    known: float
    """Part of the horizon's rows that was queued or running before"""
    known_ratio: float
    """Like `ratio`, at the moments at which nearly all rows were known; NaN where there are none"""
    by_rows: float
    """Like `ratio`, each moment weighted by the rows that came: what counts where experts are many times as busy"""
    choices: tuple[Choice, ...]
    """What carries each layer at the end of the last recording, and why"""
    seconds: float
    """Per layer and forecast"""

    @property
    def best_baseline(self) -> str:
        """The one with the lowest mean error over layers."""
        return min(BASELINES, key=lambda name: float(self.errors[name].mean()))

    @property
    def ratio(self) -> float:
        """Mean error over layers as a part of the best baseline's."""
        return float(self.errors["chosen"].mean() / max(self.errors[self.best_baseline].mean(), 1e-9))

    @property
    def worst_layer(self) -> float:
        """The highest ratio of any layer to its own best baseline."""
        best = np.min([self.errors[name] for name in BASELINES], axis=0)
        return float((self.errors["chosen"] / np.maximum(best, 1e-9)).max())

    @property
    def reachable(self) -> float | None:
        """How much of the way from the best baseline down to ``oracle tokens`` is gone; None where not recorded."""
        if "oracle tokens" not in self.errors:
            return None
        best, bound = self.errors[self.best_baseline].mean(), self.errors["oracle tokens"].mean()
        return float((best - self.errors["chosen"].mean()) / max(best - bound, 1e-9))

    @property
    def gap_closed(self) -> float:
        """How much of the way from the best baseline down to the floor is gone."""
        best, floor = self.errors[self.best_baseline].mean(), self.floor.mean()
        return float((best - self.errors["chosen"].mean()) / max(best - floor, 1e-9))


def evaluate(model: LoadModel, recordings: Sequence[Records], *, most_moments: int = 3000) -> list[Evaluation]:
    """Forecast `recordings`, which the model should not have been trained on, for each of its horizons.

    In order of time, as a service would: what a recording has told so far may be learned from.
    """
    horizons = list(model.horizons)
    steps = sum(len(records) for records in recordings)
    sampled = [sample(records, horizons, max(1, steps // most_moments)) for records in recordings]
    found = []
    for index, horizon in enumerate(horizons):
        parts = [samples[index] for samples in sampled if len(samples[index])]
        if not parts:
            raise ValueError(f"the records are too short to tell anything of {horizon}")
        found.append(_evaluate(horizon, model.horizons[horizon], parts))
    return found


def noise_floor(samples: Samples) -> npt.NDArray[np.float64]:
    """Mean error [L] of the true probabilities themselves, each row's experts drawn anew (normal approximation).

    An expert gets each of R rows with probability q = top-k x share: its count has variance R q (1 - q).
    """
    top_k = samples.shape.top_k
    rows = samples.future.counts.sum(axis=2, keepdims=True) / top_k
    chance = np.clip(samples.future.shares * top_k, 0, 1)
    deviation = np.sqrt(chance * (1 - chance) / np.maximum(rows, 1)) / top_k
    return np.asarray((deviation.sum(axis=2) * np.sqrt(2 / np.pi) / 2).mean(axis=0), np.float64)


def hottest_recall(forecast: Array, actual: Array) -> npt.NDArray[np.float64]:
    """How many of each layer's two hottest experts [n, L, E] are among the two forecast to be: [L]."""
    count = min(HOTTEST, actual.shape[2])
    told, true = (np.argsort(-values, axis=2, kind="stable")[:, :, :count] for values in (forecast, actual))
    found = (told[..., :, None] == true[..., None, :]).any(axis=3)
    return np.asarray(found.mean(axis=(0, 2)), np.float64)


def _evaluate(horizon: Horizon, model: HorizonModel, parts: Sequence[Samples]) -> Evaluation:
    """`parts` are the samples of one recording each."""
    told = [follow(model, part) for part in parts]
    samples = concatenate(parts)
    actual = samples.future.shares
    forecasts = _stacked([_methods(model, part, found) for part, found in zip(parts, told, strict=True)])
    p90 = np.concatenate([found.p90 for found in told])
    known = np.concatenate([found.candidates.rows.parts[:, [0, 2]] for found in told]).sum(axis=1)
    return Evaluation(
        horizon=horizon,
        layers=samples.shape.layers,
        moments=len(samples),
        errors={name: share_errors(forecast, actual).mean(axis=0) for name, forecast in forecasts.items()},
        recall={name: hottest_recall(forecast, actual) for name, forecast in forecasts.items()},
        coverage=np.asarray((samples.future.counts <= p90).mean(axis=(0, 2)), np.float64),
        floor=noise_floor(samples),
        known=float(known.mean()),
        known_ratio=_ratio(forecasts, actual, weights=(known > _NEARLY_ALL).astype(np.float32)),
        by_rows=_ratio(forecasts, actual, weights=samples.future.prefill_rows + samples.future.decode_rows),
        choices=told[-1].adaptation.trust.choices(),
        seconds=_seconds(model, samples),
    )


def _methods(model: HorizonModel, samples: Samples, told: Told) -> dict[str, Array]:
    """What everybody says of the samples of one recording."""
    found = plain_forecasts(samples.shares, model.mixture.static)
    found["ridge"] = model.ridge.forecast(samples.shares)
    found |= {name: told.candidates.shares[METHODS.index(name)] for name in ("mixture", "lightgbm")}
    found["chosen"] = told.shares
    then = samples.future
    rows = model.rows.told(samples.scalars, then.prefill_rows, then.decode_rows)
    found["oracle rows"] = model.mixture.forecast(samples.shares, rows)
    if then.foreseen.any():
        found["oracle tokens"] = normalised(then.foreseen)
    return found


def _ratio(forecasts: Mapping[str, Array], actual: Array, weights: npt.NDArray[np.floating]) -> float:
    """Of the chosen methods' mean error to the best baseline's, moments weighted by `weights` [n]."""
    if not weights.any():
        return float("nan")
    errors = {
        name: float(np.average(share_errors(forecast, actual).mean(axis=1), weights=weights))
        for name, forecast in forecasts.items()
        if name == "chosen" or name in BASELINES
    }
    return errors["chosen"] / max(min(errors[name] for name in BASELINES), 1e-9)


def _stacked(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _seconds(model: HorizonModel, samples: Samples) -> float:
    """The median of some forecasts of one moment each, per layer."""
    taken = []
    for i in range(min(20, len(samples))):
        started = time.perf_counter()
        model.forecast(samples.scalars[i : i + 1], samples.shares[i : i + 1])
        taken.append(time.perf_counter() - started)
    return float(np.median(taken)) / len(samples.shape.layers)
