"""Where the time of the engine's steps goes."""

from __future__ import annotations

import time

PHASES = ("schedule", "forward", "sample", "emit", "dispatch", "inline", "wait", "combine")
"""`forward` includes the last four, which are the experts' share of it."""


class StepTimes:
    """Seconds of each phase since the start. Kept by the engine's thread, read by any."""

    def __init__(self) -> None:
        self.steps = 0
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._last = 0.0

    def step(self, started: float, scheduled: float, computed: float, sampled: float) -> None:
        """Note a step that ends now, by `time.perf_counter` at its turns."""
        self.steps += 1
        marks = (started, scheduled, computed, sampled, time.perf_counter())
        for phase, begin, end in zip(PHASES, marks, marks[1:], strict=False):
            self.seconds[phase] += end - begin

    def start(self) -> float:
        """The next phase begins now, which is returned."""
        self._last = time.perf_counter()
        return self._last

    def end(self, phase: str) -> float:
        """Charge `phase` with the time since the last `start` or `end`, and return it."""
        now = time.perf_counter()
        spent, self._last = now - self._last, now
        self.seconds[phase] += spent
        return spent
