"""A replay in pictures: what was asked and answered over time, how long it took, how late requests were sent."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from replay.figures import BLUE, GREEN, GREY, ORANGE, RED
from replay.summary import METRICS, Tally, column

LOAD_SIZE, LATENCY_SIZE, TIMELINE_SIZE = (9.0, 4.6), (9.0, 3.0), (9.0, 4.6)
_BINS = 120
_COLORS = dict(zip(METRICS, (BLUE, ORANGE, GREEN, GREY), strict=True))
_LEAST_S, _LEAST_LATE_MS = 1e-4, 1e-2  # logarithmic axes begin there


def draw_load(figure: Any, tally: Tally) -> None:
    """Requests sent, answered and failed each second; below it, how many were under way."""
    sent, end, ok = column(tally.sent_s), column(tally.end_s), np.array(tally.ok, bool)
    edges = _edges(end)
    width = edges[1] - edges[0]
    rate, running = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for values, label, color in ((sent, "sent", GREY), (end[ok], "answered", BLUE), (end[~ok], "failed", RED)):
        if len(values):
            rate.stairs(np.histogram(values, edges)[0] / width, edges, label=label, color=color, lw=1.4)
    rate.set(ylabel="requests/s", title="Load", ylim=(0, None))
    rate.legend(ncols=3, loc="upper right")
    under_way = np.searchsorted(np.sort(sent), edges, "right") - np.searchsorted(np.sort(end), edges, "right")
    running.fill_between(edges, under_way, color=BLUE, alpha=0.35, lw=0, step="post")
    running.set(xlabel="seconds", ylabel="under way", ylim=(0, None), xlim=(0, edges[-1]))


def draw_latency(figure: Any, tally: Tally) -> None:
    """The distribution of each latency, and of how late requests were sent."""
    times, late = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, label in METRICS.items():
        _distribution(times, column(tally.times[name]), label, _COLORS[name])
    times.set(xscale="log", xlabel="seconds", ylabel="part no longer", title="Latencies", ylim=(0, 1.02))
    if times.lines:
        times.legend(loc="upper left", fontsize=8)
    _distribution(late, np.maximum(1e3 * column(tally.late_s), _LEAST_LATE_MS), "late", GREY)
    late.set(xscale="log", xlabel="ms after the trace's time", title="How late requests were sent", ylim=(0, 1.02))


def draw_timeline(figure: Any, tally: Tally) -> None:
    """Time to first token and time per token over the replay: median and 90 %."""
    sent, edges = column(tally.sent_s), _edges(column(tally.sent_s))
    place = np.clip(np.digitize(sent, edges) - 1, 0, len(edges) - 2)
    middle = (edges[1:] + edges[:-1]) / 2
    for axis, name in zip(figure.subplots(2, 1, sharex=True), ("ttft", "tpot"), strict=True):
        values = column(tally.times[name])
        for percentile, line in ((50, "-"), (90, ":")):
            curve = _by_bin(values, place, len(middle), percentile)
            seen = ~np.isnan(curve)
            axis.plot(middle[seen], curve[seen], line, color=_COLORS[name], label=f"p{percentile}")
        axis.set(ylabel="seconds", title=METRICS[name].capitalize(), ylim=(0, None))
        axis.legend(ncols=2, loc="upper right")
    axis.set(xlabel="seconds; requests by when they were sent", xlim=(0, edges[-1]))


def _edges(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Bins of a second at least."""
    last = float(values.max()) if len(values) else 1.0
    return np.linspace(0.0, max(last, 1.0), 1 + max(min(_BINS, int(last)), 1))


def _by_bin(
    values: npt.NDArray[np.float64], place: npt.NDArray[np.int64], bins: int, percentile: int
) -> npt.NDArray[np.float64]:
    found = np.full(bins, np.nan)
    good = ~np.isnan(values)
    for number in np.unique(place[good]):
        found[number] = np.percentile(values[good & (place == number)], percentile)
    return found


def _distribution(axis: Any, values: npt.NDArray[np.float64], label: str, color: str) -> None:
    values = np.sort(np.maximum(values[~np.isnan(values)], _LEAST_S))
    if len(values):
        shown = values[np.linspace(0, len(values) - 1, min(len(values), 400)).astype(int)]
        part = np.searchsorted(values, shown, "right") / len(values)
        axis.step(shown, part, where="post", label=label, color=color)
