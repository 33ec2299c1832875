"""When to train again (pure), and training beside everything else (a thin shell around an executor)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np

from predictor.load_step import LoadStep
from predictor.model import LoadModel
from predictor.records import Records, stack
from predictor.shape import ModelShape


@dataclass(frozen=True)
class RetrainPolicy:
    """When a new model is wanted. Steps are engine steps seen."""

    first_after: int = 4000
    """Steps before the first model."""
    at_least: int = 4000
    """Steps between two trainings, whatever else."""
    at_most: int = 200_000
    """Steps after which a model is renewed although nothing seems wrong."""
    drift: float = 1.3
    """A recent error of so many times the one on validation is drift."""


class DriftWatch:
    """A fading mean of the forecast errors seen live, against what validation promised."""

    def __init__(self, promised: float, memory: int = 200) -> None:
        """`promised`: mean error over layers on validation; `memory`: forecasts."""
        self.promised = promised
        self.recent = 0.0
        self._weight = 0.0
        self._keep = 1 - 1 / memory

    def observe(self, error: float) -> None:
        """Add the mean error over layers of one forecast; NaN is passed over."""
        if np.isfinite(error):
            self._weight = self._weight * self._keep + 1
            self.recent += (error - self.recent) / self._weight

    @property
    def ratio(self) -> float:
        """Recent error as a multiple of the promised one; 1 before there is enough to tell."""
        settled = self._weight > 0.2 / (1 - self._keep)
        return self.recent / max(self.promised, 1e-6) if settled else 1.0


def reason_to_train(policy: RetrainPolicy, *, has_model: bool, steps: int, ratio: float) -> str | None:
    """Why a model should be trained now, or None; `steps` were seen since the last training (or since the start)."""
    if not has_model:
        return f"no model yet after {steps} steps" if steps >= policy.first_after else None
    if steps < policy.at_least:
        return None
    if ratio > policy.drift:
        return f"drift: the error is {ratio:.2f} times what validation promised"
    return f"{steps} steps since the last training" if steps >= policy.at_most else None


class BackgroundTraining:
    """Keeps the latest steps and trains from them on `executor`: whoever adds steps never waits.

    Use an executor with one worker, and a process where other threads must not be slowed down.
    """

    def __init__(
        self,
        shape: ModelShape,
        executor: Executor,
        train: Callable[[list[Records]], LoadModel],
        *,
        keep_steps: int = 100_000,
    ) -> None:
        """`train` is `predictor.training.train`, or a partial of it (a process executor pickles it)."""
        self._shape = shape
        self._executor = executor
        self._train = train
        self._steps: deque[LoadStep] = deque(maxlen=keep_steps)
        self._running: Future[LoadModel] | None = None
        self.steps_since = 0
        """Steps since the last training began."""

    @property
    def busy(self) -> bool:
        """Whether a training runs, or its model was not taken yet."""
        return self._running is not None

    def add(self, step: LoadStep) -> None:
        """Remember a step."""
        self._steps.append(step)
        self.steps_since += 1

    def start(self) -> None:
        """Train from the steps so far, unless a training runs already."""
        if self._running is None:
            self.steps_since = 0
            self._running = self._executor.submit(_run, self._train, self._shape, list(self._steps))

    def take(self) -> LoadModel | None:
        """The model of a training that has ended, once; its error where it failed. None while there is nothing new."""
        if self._running is None or not self._running.done():
            return None
        done, self._running = self._running, None
        return done.result()


def _run(train: Callable[[list[Records]], LoadModel], shape: ModelShape, steps: list[LoadStep]) -> LoadModel:
    return train([stack(shape, steps)])
