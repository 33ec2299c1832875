"""Layer-aware: how much each layer trusts each method, from validation and from what came since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]

METHODS = ("average 16", "average 64", "average 256", "mixture", "lightgbm")
"""What layers choose from, in order from simple to elaborate."""

_STRICTNESS = 40.0  # a method whose error on validation is 1/40 higher gets 1/e of the weight
_LEAST = 0.01  # part that every method begins with: traffic may change
_RATE = 1.0  # with a relative error of one more, over a whole horizon, a method falls to 1/e
_RETURN = 0.02  # part of the trust that goes back to what validation said, over a whole horizon
_MEMORY = 1 / 30  # part of a recent error that a whole horizon replaces


@dataclass(frozen=True)
class Choice:
    """The method that carries one layer, and why."""

    method: str
    errors: Mapping[str, float]
    """Half the L1 distance of shares, by method"""
    part: float = 1.0
    """Its part of the forecast; the others share the rest."""
    when: str = "on validation"
    """What the errors are of."""

    @property
    def reason(self) -> str:
        """In words."""
        others = {name: error for name, error in self.errors.items() if name != self.method}
        if not others:
            return f"{self.method}: nothing else was tried"
        second = min(others, key=others.__getitem__)
        return (
            f"{self.method} carries {self.part:.0%}: error {self.errors[self.method]:.4f} {self.when}, "
            f"the next best ({second}) {others[second]:.4f}"
        )


class Trust:
    """The weight of each of `METHODS` in each layer, moved by every forecast that can be judged.

    Exponentiated gradient on errors relative to their mean, which come late: with nothing but what has happened it ends
    near the best method of each layer, whichever that is, and follows when another becomes the best.
    """

    def __init__(self, errors: Floats) -> None:
        """`errors` [METHODS, L] are those on validation."""
        least = np.maximum(errors.min(axis=0), 1e-9)
        weights = np.exp(-_STRICTNESS * (errors / least - 1))
        self._prior = np.maximum(weights / weights.sum(axis=0), _LEAST)
        self._prior /= self._prior.sum(axis=0)
        self._errors = errors.copy()
        self.weights = self._prior
        """[METHODS, L], sums of one"""
        self._learned = False

    def learn(self, errors: Floats, credit: float) -> None:
        """Move by `errors` [METHODS, L]; `credit`: for what part of a horizon they tell anything new, 0 to 1."""
        mean = errors.mean(axis=0)
        told = mean > 0  # a layer in which nothing came tells nothing
        moved = self.weights * np.exp(-_RATE * credit * np.where(told, errors / np.maximum(mean, 1e-9), 0))
        moved /= moved.sum(axis=0)
        back = _RETURN * credit
        self.weights = (1 - back) * moved + back * self._prior
        self._learned |= bool(told.any())
        self._errors += np.where(told, _MEMORY * credit, 0) * (errors - self._errors)

    def blend(self, forecasts: Array) -> Array:
        """`forecasts` [METHODS, n, L, E] as one [n, L, E]."""
        return np.asarray(np.einsum("ml,mnle->nle", self.weights, forecasts), np.float32)

    def choices(self) -> tuple[Choice, ...]:
        """For each layer what carries it, and why."""
        leading = self.weights.argmax(axis=0).tolist()
        return tuple(
            Choice(
                METHODS[method],
                dict(zip(METHODS, self._errors[:, layer].tolist(), strict=True)),
                round(float(self.weights[method, layer]), 4),
                "lately" if self._learned else "on validation",
            )
            for layer, method in enumerate(leading)
        )


def share_errors(forecast: Array, actual: Array) -> Floats:
    """Half the L1 distance of shares [..., n, L, E], for each moment and layer: [..., n, L]."""
    return np.asarray(np.abs(forecast - actual).sum(axis=-1) / 2, np.float64)


def validated(forecasts: Mapping[str, Array], actual: Array) -> tuple[Choice, ...]:
    """For each layer of `actual` [n, L, E] what carries it after validation alone."""
    errors = [share_errors(forecasts[name], actual).mean(axis=0) for name in METHODS]
    return Trust(np.array(errors)).choices()


def trust_of(choices: Sequence[Choice]) -> Trust:
    """The trust that `choices`, made on validation, begin with."""
    return Trust(np.array([[choice.errors[name] for choice in choices] for name in METHODS]))
