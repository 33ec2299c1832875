"""Layer-aware: each layer keeps the method that wins on validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

_CLEARLY = 0.995  # the simpler method stays unless another's error is below this part of its own


@dataclass(frozen=True)
class Choice:
    """The method of one layer, and why."""

    method: str
    errors: Mapping[str, float]
    """Half the L1 distance of shares on validation data, by method"""

    @property
    def reason(self) -> str:
        """In words."""
        others = {name: error for name, error in self.errors.items() if name != self.method}
        if not others:
            return f"{self.method}: nothing else was tried"
        second = min(others, key=others.__getitem__)
        return (
            f"{self.method}: error {self.errors[self.method]:.4f} on validation, the next best ({second}) "
            f"{others[second]:.4f}"
        )


def share_errors(forecast: Array, actual: Array) -> npt.NDArray[np.float64]:
    """Half the L1 distance of shares [n, L, E], for each moment and layer: [n, L]."""
    return np.asarray(np.abs(forecast - actual).sum(axis=2) / 2, np.float64)


def choose(forecasts: Mapping[str, Array], actual: Array) -> tuple[Choice, ...]:
    """For each layer the best of `forecasts` (method -> [n, L, E]), which are in order from simple to elaborate."""
    errors = {name: share_errors(forecast, actual).mean(axis=0) for name, forecast in forecasts.items()}
    return tuple(
        _choose({name: float(error[layer]) for name, error in errors.items()}) for layer in range(actual.shape[1])
    )


def _choose(errors: Mapping[str, float]) -> Choice:
    best = next(iter(errors))
    for name, error in errors.items():
        if error < _CLEARLY * errors[best]:
            best = name
    return Choice(best, errors)
