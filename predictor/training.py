"""From recordings to a trained predictor. Deterministic: the same records and seed give the same model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from predictor.baselines import HistoryRidge
from predictor.choice import METHODS, validated
from predictor.headroom import Headroom
from predictor.horizon import HORIZONS, Horizon
from predictor.layer_trees import LayerTrees
from predictor.mixture import Mixture
from predictor.model import HorizonModel, LoadModel
from predictor.records import Records
from predictor.rows_model import RowsForecast, RowsModel
from predictor.samples import Samples, concatenate, sample

LEAST_SAMPLES = 40
_MOST_CELLS = 6_000_000  # values of a sample's shares that are kept at once
_MOST_MOMENTS = 24_000
_MOST_CALIBRATED = 2000  # moments besides those of the last part
_VALIDATION = 0.25  # the last part of each recording


class TrainingError(ValueError):
    """These records are not enough to learn from; the message says why."""


def train(recordings: Sequence[Records], *, horizons: Sequence[Horizon] = HORIZONS, seed: int = 0) -> LoadModel:
    """Learn from `recordings` of one model; raise TrainingError for too few, or of different models.

    The last quarter of each recording is what methods are chosen and quantiles set right by.
    """
    if not recordings or any(records.shape != recordings[0].shape for records in recordings):
        raise TrainingError("train from records of one model, and at least one file of them")
    shape, steps = recordings[0].shape, sum(len(records) for records in recordings)
    cells = len(shape.layers) * shape.experts
    stride = max(1, -(-steps // min(_MOST_MOMENTS, max(400, _MOST_CELLS // cells))))
    sampled = [sample(records, horizons, stride) for records in recordings]
    models = {}
    for index, horizon in enumerate(horizons):
        parts = [_split(samples[index], horizon, stride) for samples in sampled]
        learn, check = concatenate([part[0] for part in parts]), concatenate([part[1] for part in parts])
        if min(len(learn), len(check)) < LEAST_SAMPLES:
            raise TrainingError(f"{steps} steps are too few to learn forecasts of {horizon} from: record for longer")
        models[horizon] = fit_horizon(learn, check, horizon, seed)
    return LoadModel(shape, seed, steps, models)


def _split(samples: Samples, horizon: Horizon, stride: int) -> tuple[Samples, Samples]:
    """Earlier and later moments, with a gap between them so that no horizon reaches into the later part."""
    cut = int(len(samples) * (1 - _VALIDATION))
    gap = -(-horizon.steps // stride) if horizon.steps else max(1, len(samples) // 100)
    return samples.take(slice(0, max(cut - gap, 0))), samples.take(slice(cut, None))


def fit_horizon(learn: Samples, check: Samples, horizon: Horizon, seed: int) -> HorizonModel:
    """Learn from some samples; choose methods and set quantiles right by others, all of `horizon`."""
    rows_model = RowsModel.fit(learn, horizon, seed)
    rows = rows_model.forecast(learn.scalars)
    mixture = Mixture.fit(learn, rows)
    mixed = mixture.forecast(learn.shares, rows)
    layer_trees = LayerTrees.fit(learn, mixed, rows, mixture.static, seed)
    expected = layer_trees.forecast(learn.shares, mixed, rows) * (rows.total * learn.shape.top_k)[:, None, None]
    model = HorizonModel(
        top_k=learn.shape.top_k,
        rows=rows_model,
        ridge=HistoryRidge.fit(learn),
        mixture=mixture,
        trees=layer_trees,
        headroom=Headroom.fit(learn, expected.astype(np.float32), rows, seed),
        choices=(),
    )
    candidates = model.candidates(check.scalars, check.shares)
    by_method = dict(zip(METHODS, candidates.shares, strict=True))
    model = replace(model, choices=validated(by_method, check.future.shares))
    forecast = model.forecast(check.scalars, check.shares)
    model.headroom.calibrate(*_joined([(check, forecast.rows, candidates.rows), _unseen(learn, check, horizon, seed)]))
    return model


Forecasts = tuple[Samples, npt.NDArray[np.float32], RowsForecast]


def _unseen(learn: Samples, check: Samples, horizon: Horizon, seed: int) -> Forecasts:
    """Some of `learn`, with what a mixture that knows only `check` forecasts of them.

    The traffic of a recording's end alone is too much alike to tell how far forecasts of other traffic err.
    """
    some = learn.take(slice(None, None, max(1, -(-len(learn) // _MOST_CALIBRATED))))
    rows_model = RowsModel.fit(check, horizon, seed)
    rows = rows_model.forecast(some.scalars)
    shares = Mixture.fit(check, rows_model.forecast(check.scalars)).forecast(some.shares, rows)
    return some, shares * (rows.total * learn.shape.top_k)[:, None, None], rows


def _joined(parts: Sequence[Forecasts]) -> Forecasts:
    samples, forecasts, rows = zip(*parts, strict=True)
    return concatenate(samples), np.concatenate(forecasts), RowsForecast.concatenate(rows)
