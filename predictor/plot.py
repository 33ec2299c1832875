"""Predicted against actual load of the experts over time, as a picture."""

from __future__ import annotations

import os

import matplotlib
import numpy as np

from predictor.adaptation import follow
from predictor.horizon import Horizon
from predictor.model import LoadModel
from predictor.records import Records
from predictor.samples import sample

_EXPERTS = 8  # the most loaded ones of a layer
_MOMENTS = 400


def draw(model: LoadModel, records: Records, horizon: Horizon, path: str | os.PathLike[str]) -> None:
    """Write a PNG: the rows of up to four layers' most loaded experts in the horizon, and what was forecast."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    samples = sample(records, [horizon], max(1, len(records) // _MOMENTS))[0]
    forecast = follow(model.horizons[horizon], samples)
    choices = forecast.adaptation.trust.choices()
    times = records.time_s[samples.steps] - records.time_s[0]
    layers = np.unique(np.linspace(0, len(records.shape.layers) - 1, 4).astype(int))
    hottest = [np.argsort(-samples.future.counts[:, layer].sum(axis=0))[:_EXPERTS] for layer in layers]
    rows = len(hottest[0])
    figure, axes = pyplot.subplots(rows, len(layers), figsize=(5 * len(layers), 1.7 * rows), sharex=True, squeeze=False)
    for column, layer in enumerate(layers):
        for row, expert in enumerate(sorted(hottest[column])):
            axis = axes[row, column]
            axis.fill_between(times, forecast.p90[:, layer, expert], color="tab:orange", alpha=0.15, lw=0, label="p90")
            axis.plot(times, samples.future.counts[:, layer, expert], color="black", lw=0.8, label="actual")
            axis.plot(times, forecast.rows[:, layer, expert], color="tab:orange", lw=0.8, label="forecast")
            axis.set_ylabel(f"expert {expert}", fontsize=8)
            axis.tick_params(labelsize=7)
        axes[0, column].set_title(f"layer {records.shape.layers[layer]} ({choices[layer].method})", fontsize=9)
        axes[-1, column].set_xlabel("s", fontsize=8)
    axes[0, 0].legend(fontsize=7, loc="upper right")
    figure.suptitle(f"Rows of each expert within the next {horizon}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
