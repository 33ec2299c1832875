"""What the load predictor costs on one core: 58 layers x 256 experts top-8 (as DeepSeek-V3), and 4 x 8.

Forecasting is measured with synthetic features and trained models; updates with synthetic steps of 64 decoding rows and
of whole prompt chunks; training with as many synthetic steps as the default model makes in an hour. The last line is
the figure: milliseconds of a forecast per layer (58 x 256).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from bench.report import finish, options
from predictor.features import SCALARS, SHARES, History
from predictor.horizon import HORIZONS, Future
from predictor.load_step import SIGNALS
from predictor.mixture import normalised
from predictor.records import Records
from predictor.routing import StepRouting
from predictor.samples import Samples
from predictor.shape import ModelShape
from predictor.signals import LoadSignals
from predictor.training import fit_horizon, train

LARGE = ModelShape("large", tuple(range(3, 61)), 256, 8, 129_280)
SMALL = ModelShape("small", tuple(range(4)), 8, 2, 4096)
FORECAST_MS, UPDATE_US = 0.2, 50.0  # the bars, per layer
TRAINING_S = 60.0  # the bar for an hour
HOUR_STEPS = 100_000


def samples(shape: ModelShape, count: int, seed: int = 0) -> Samples:
    """Synthetic features: skewed shares that drift, and a future much like them."""
    rng = np.random.default_rng(seed)
    size = (len(shape.layers), shape.experts)
    base = rng.gamma(0.7, size=size)
    drift = base * np.exp(0.3 * rng.normal(size=(count, *size)))
    shares = normalised((drift[:, None] * np.exp(0.2 * rng.normal(size=(1, len(SHARES), *size)))).astype(np.float32))
    scalars = rng.gamma(2.0, 100.0, size=(count, len(SCALARS))).astype(np.float32)
    rows = (scalars[:, :9].sum(axis=1), scalars[:, 9:12].sum(axis=1))
    counts = rng.poisson(shares.mean(axis=1) * (rows[0] + rows[1])[:, None, None] * shape.top_k)
    return Samples(
        shape,
        np.arange(count),
        np.arange(count) + 16,
        scalars,
        shares,
        Future(counts.astype(np.float32), *rows, np.zeros_like(counts, np.float32)),
    )


def routing(shape: ModelShape, rows: int, seed: int, *, prefill: bool, budget: int = 512) -> StepRouting:
    """A step of 64 running sequences, 16 budgets of tokens behind it."""
    rng = np.random.default_rng(seed)
    layers, experts = len(shape.layers), shape.experts
    tokens = (rng.zipf(1.2, size=rows) % shape.vocabulary).astype(np.int32)
    prompts = _prompts(shape, seed, budget)
    first = rng.integers(experts, size=(layers, rows, 1))
    chosen = (first + np.arange(shape.top_k) * (experts // shape.top_k)) % experts
    return StepRouting(
        time_s=seed * 0.05,
        token_ids=tokens,
        sequences=np.arange(rows, dtype=np.int64) % 64,
        prefill=np.full(rows, prefill),
        experts=chosen.astype(np.int16),
        look_ahead=np.zeros((layers, experts), np.int32),
        running=np.arange(64, dtype=np.int64),
        prompt_left=np.zeros(64, np.int32),
        tokens_left=np.full(64, 1000 - seed, np.int32),
        queue=[(number, 0, len(prompt)) for number, prompt in prompts.items()],
        prompts=prompts,
        waiting=30,
        waiting_tokens=16 * budget,
        token_budget=budget,
        max_sequences=64,
    )


def _prompts(shape: ModelShape, step: int, budget: int) -> dict[int, npt.NDArray[np.int32]]:
    """What waits at a step: prompts of half a budget, two of which have joined since the step before."""
    numbers = range(2 * step, 2 * step + 2 * 16)
    draw = [np.random.default_rng(number).zipf(1.2, size=budget // 2) for number in numbers]
    return {number: (words % shape.vocabulary).astype(np.int32) for number, words in zip(numbers, draw, strict=True)}


def median_s(act: Callable[[], object], times: int) -> float:
    """Seconds."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        act()
        taken.append(time.perf_counter() - started)
    return float(np.median(taken))


def forecast_ms(shape: ModelShape, moments: int, times: int) -> tuple[float, float]:
    """(ms of a forecast per layer, s of training)."""
    data = samples(shape, moments)
    started = time.perf_counter()
    model = fit_horizon(data, data, HORIZONS[0], 0)
    trained = time.perf_counter() - started
    spent = median_s(lambda: model.forecast(data.scalars[:1], data.shares[:1]), times)
    return 1e3 * spent / len(shape.layers), trained


def update_us(shape: ModelShape, rows: int, times: int, *, prefill: bool) -> tuple[float, float]:
    """(us of signals, us of history with its features) per layer and step: means over steps."""
    steps = [routing(shape, rows, seed, prefill=prefill) for seed in range(2 * times)]
    signals, history = LoadSignals(shape), History(shape)
    loads = [signals.observe(step) for step in steps[:times]]
    started = time.perf_counter()
    for step in steps[times:]:
        signals.observe(step)
    middle = time.perf_counter()
    for load in loads:
        history.observe(load)
    ended = time.perf_counter()
    each = 1e6 / times / len(shape.layers)
    return (middle - started) * each, (ended - middle) * each


def recording(shape: ModelShape, steps: int) -> Records:
    """Synthetic steps: shares that wander, a queue that comes and goes."""
    rng = np.random.default_rng(0)
    size = (steps, len(shape.layers), shape.experts)
    shares = normalised(np.exp(np.sin(np.cumsum(0.02 * rng.normal(size=size), axis=0))).astype(np.float32))
    busy = (np.sin(np.arange(steps) / 300) > 0).astype(np.int32)
    prefill, decode = 100 + 300 * busy, 20 + 40 * busy
    prompts, answers = (rng.poisson(shares * (rows * shape.top_k)[:, None, None]) for rows in (prefill, decode))
    return Records(
        shape=shape,
        time_s=np.cumsum(0.02 + 0.0001 * prefill),
        prefill_rows=prefill,
        decode_rows=decode,
        running=decode + 1,
        waiting=60 * busy,
        waiting_tokens=15_000 * busy,
        prompt_left=100 * busy,
        token_budget=np.full(steps, 512, np.int32),
        max_sequences=np.full(steps, 64, np.int32),
        prefill_counts=prompts.astype(np.int32),
        decode_counts=answers.astype(np.int32),
        look_ahead=prompts.astype(np.int32),
        signals=np.repeat(shares[:, None], len(SIGNALS), axis=1),
        signal_rows=np.repeat(500 + 5000 * busy[:, None], len(SIGNALS), axis=1).astype(np.float32),
        foreseen=np.zeros(size, np.float32),
    )


def training_s(steps: int) -> float:
    """Seconds that training takes from so many steps of the small shape, both horizons."""
    records = recording(SMALL, steps)
    started = time.perf_counter()
    train([records])
    return time.perf_counter() - started


def main() -> None:
    """Measure, and judge by the bars."""
    arguments = options(str(__doc__))
    with threadpool_limits(1):
        _measure(arguments)


def _measure(arguments: argparse.Namespace) -> None:
    times = 10 if arguments.quick else 40
    figures: dict[str, float] = {}
    for name, shape, moments in (("58x256", LARGE, 30 if arguments.quick else 60), ("4x8", SMALL, 2000)):
        figures[f"forecast_ms {name}"], figures[f"training_s {name}"] = forecast_ms(shape, moments, times)
        for rows, prefill, kind in ((64, False, "64 decoding rows"), (512, True, "a chunk of 512")):
            signals, history = update_us(shape, rows, times if shape is LARGE else 300, prefill=prefill)
            figures[f"update_us {name} {kind}"] = signals + history
    figures["training_s 4x8 an hour"] = training_s(HOUR_STEPS)
    for label, value in figures.items():
        print(f"{label}: {value:.3g}")
    passed = all(value <= UPDATE_US for label, value in figures.items() if label.startswith("update"))
    passed &= figures["forecast_ms 58x256"] <= FORECAST_MS and figures["training_s 4x8 an hour"] <= TRAINING_S
    figure = f"{figures['forecast_ms 58x256']:.3f} ms per layer"
    finish("predictor", figures, figure, passed=passed, check=arguments.check)


if __name__ == "__main__":
    main()
