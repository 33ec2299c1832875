"""The load of all gateways: a follower for each, and what they expect together. Pure: time is an argument."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from deploy.planner.follower import Follower
from predictor.load_step import LoadStep
from predictor.model import LoadModel
from predictor.shape import ModelShape


@dataclass(frozen=True, eq=False, slots=True)
class ExpectedLoad:
    """What all gateways together expect. L layers, E experts."""

    rows: npt.NDArray[np.float64]
    """[L, E] within the horizon"""
    p90: npt.NDArray[np.float64]
    """[L, E] exceeded one time in ten"""
    steps_per_s: float
    idle_s: npt.NDArray[np.float64]
    """[L, E] seconds since each slice's last row; since the planner began where it never had one"""


class _Heard:
    """One gateway: its follower, and when how many of its steps were heard of."""

    def __init__(self, follower: Follower) -> None:
        self.follower = follower
        self.steps: deque[tuple[float, int]] = deque()

    def rate(self, now_s: float, span_s: float) -> float:
        """Steps a second of late."""
        while self.steps and self.steps[0][0] <= now_s - span_s:
            self.steps.popleft()
        return sum(count for _, count in self.steps) / span_s


class Loads:
    """Followers of gateways that serve the same model. Forecasts look `horizon_s` seconds ahead."""

    def __init__(self, shape: ModelShape, horizon_s: float, model: LoadModel | None, now_s: float) -> None:
        """Raise ValueError for a model of another shape."""
        self.shape = shape
        self._horizon_s = horizon_s
        self._model = model
        self._gateways: dict[str, _Heard] = {}
        self._last_row_s = np.full((len(shape.layers), shape.experts), now_s)

    @property
    def gateways(self) -> list[str]:
        """Those heard of, the last one last."""
        return list(self._gateways)

    @property
    def followers(self) -> list[Follower]:
        """In the order of `gateways`."""
        return [heard.follower for heard in self._gateways.values()]

    @property
    def steps(self) -> int:
        """Seen so far, of the gateways that are still there."""
        return sum(follower.steps for follower in self.followers)

    @property
    def drift(self) -> float:
        """The largest of the followers'."""
        return max((follower.drift for follower in self.followers), default=0.0)

    def use(self, model: LoadModel | None) -> None:
        """Forecast with `model` from now on."""
        self._model = model
        for follower in self.followers:
            follower.use(model)

    def look(self, horizon_s: float) -> None:
        """Forecast so far ahead from now on."""
        self._horizon_s = horizon_s
        for follower in self.followers:
            follower.look(horizon_s)

    def observe(self, gateway: str, steps: Sequence[LoadStep], now_s: float) -> None:
        """Add steps of a gateway that are heard of now."""
        heard = self._gateways.pop(gateway, None) or _Heard(Follower(self.shape, self._horizon_s, self._model))
        self._gateways[gateway] = heard
        for step in steps:
            heard.follower.observe(step)
        heard.steps.append((now_s, len(steps)))
        for step in steps:
            self._last_row_s[(step.prefill_counts + step.decode_counts) > 0] = now_s

    def keep(self, alive: Iterable[str], now_s: float) -> None:
        """Forget gateways that are neither `alive` nor were heard of within the horizon."""
        living = set(alive)
        for name, heard in list(self._gateways.items()):
            if name not in living and not heard.rate(now_s, self._horizon_s):
                del self._gateways[name]

    def expected(self, now_s: float) -> ExpectedLoad:
        """What the latest forecasts of all followers say together; a gateway that is silent expects nothing."""
        rows = np.zeros(self._last_row_s.shape)
        margin = np.zeros_like(rows)
        rates = 0.0
        for heard in self._gateways.values():
            latest, rate = heard.follower.latest, heard.rate(now_s, self._horizon_s)
            if latest is None or not rate:
                continue
            rates += rate
            rows += latest.rows[0]
            margin += np.square(latest.p90[0] - latest.rows[0])
        return ExpectedLoad(rows, rows + np.sqrt(margin), rates, now_s - self._last_row_s)
