"""What the load predictor costs on one core: 58 layers x 256 experts top-8 (as DeepSeek-V3), and 4 x 8.

Forecasting is measured with synthetic features and trained models; updates with synthetic steps of 64 decoding rows and
of whole prompt chunks. The last line is the figure: milliseconds of a forecast per layer (58 x 256).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bench.report import finish, options
from predictor.choice import Choice
from predictor.features import SCALARS, SHARES, History
from predictor.horizon import HORIZONS, Future
from predictor.mixture import normalised
from predictor.routing import StepRouting
from predictor.samples import Samples
from predictor.shape import ModelShape
from predictor.signals import LoadSignals
from predictor.training import fit_horizon

LARGE = ModelShape("large", tuple(range(3, 61)), 256, 8, 129_280)
SMALL = ModelShape("small", tuple(range(4)), 8, 2, 4096)
FORECAST_MS, UPDATE_US = 0.2, 50.0  # the bars, per layer


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
    """(ms of a forecast per layer with LightGBM in every layer, s of training)."""
    data = samples(shape, moments)
    started = time.perf_counter()
    model = fit_horizon(data, data, HORIZONS[0], 0)
    trained = time.perf_counter() - started
    model = dataclasses.replace(model, choices=tuple(Choice("lightgbm", {}) for _ in shape.layers))  # the dearest
    spent = median_s(lambda: model.forecast(data.scalars[:1], data.shares[:1]), times)
    return 1e3 * spent / len(shape.layers), trained


def update_us(shape: ModelShape, rows: int, times: int, *, prefill: bool) -> tuple[float, float]:
    """(us of signals, us of history with its features) per layer and step: means over steps."""
    steps = [routing(shape, rows, seed, prefill=prefill) for seed in range(times)]
    signals, history = LoadSignals(shape), History(shape)
    loads = [signals.observe(step) for step in steps]
    started = time.perf_counter()
    for step in steps:
        signals.observe(step)
    middle = time.perf_counter()
    for load in loads:
        history.observe(load)
    ended = time.perf_counter()
    each = 1e6 / times / len(shape.layers)
    return (middle - started) * each, (ended - middle) * each


def main() -> None:
    """Measure, and judge by the two bars of the large shape; the small one's fixed costs are told beside them."""
    arguments = options(str(__doc__))
    times = 10 if arguments.quick else 40
    figures: dict[str, float] = {}
    for name, shape, moments in (("58x256", LARGE, 30 if arguments.quick else 60), ("4x8", SMALL, 2000)):
        figures[f"forecast_ms {name}"], figures[f"training_s {name}"] = forecast_ms(shape, moments, times)
        for rows, prefill, kind in ((64, False, "64 decoding rows"), (512, True, "a chunk of 512")):
            signals, history = update_us(shape, rows, times, prefill=prefill)
            figures[f"update_us {name} {kind}"] = signals + history
    for label, value in figures.items():
        print(f"{label}: {value:.3g}")
    passed = all(value <= UPDATE_US for label, value in figures.items() if label.startswith("update"))
    passed &= figures["forecast_ms 58x256"] <= FORECAST_MS
    figure = f"{figures['forecast_ms 58x256']:.3f} ms per layer"
    finish("predictor", figures, figure, passed=passed, check=arguments.check)


if __name__ == "__main__":
    main()
