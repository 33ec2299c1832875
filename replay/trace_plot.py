"""A trace as a picture: its rate over time, and how long prompts and answers are."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt

from replay.spans import tell_duration
from replay.statistics import TraceStatistics

_POINTS = 600


def draw(statistics: TraceStatistics, title: str, path: Path) -> None:
    """Write a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rate, lengths) = pyplot.subplots(2, 1, figsize=(10, 6), layout="constrained")
    width = max(1, len(statistics.arrivals) // _POINTS)
    counts = np.add.reduceat(statistics.arrivals, np.arange(0, len(statistics.arrivals), width))
    step_s = width * statistics.bin_s
    unit, unit_s = _time_unit(statistics.span_s)
    rate.stairs(counts / step_s, np.arange(len(counts) + 1) * step_s / unit_s, fill=True, color="tab:blue", alpha=0.6)
    rate.axhline(statistics.rate, color="black", lw=0.8, ls=":")
    rate.set(xlabel=unit, ylabel="requests/s", title=f"{title}: mean of {tell_duration(step_s)} each", ylim=(0, None))
    for histogram, name, color in (
        (statistics.prompt_histogram, "prompt", "tab:blue"),
        (statistics.answer_histogram, "answer", "tab:orange"),
    ):
        _draw_lengths(lengths, histogram, name, color)
    lengths.set(xscale="log", xlabel="tokens", ylabel="part of requests that are no longer", ylim=(0, 1.02))
    lengths.grid(alpha=0.3)
    lengths.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_lengths(axis: matplotlib.axes.Axes, histogram: npt.NDArray[np.int64], name: str, color: str) -> None:
    present = np.flatnonzero(histogram)
    if len(present):
        below = np.cumsum(histogram[present]) / histogram.sum()
        axis.step(np.maximum(present, 1), below, where="post", label=name, color=color)


def _time_unit(span_s: float) -> tuple[str, float]:
    for unit, seconds in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if span_s > 3 * seconds:
            return unit, seconds
    return "seconds", 1.0
