"""Why a plan is as it is, in words for the operator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.arrays import Floats, Ints
from placement.grid import Grid
from placement.judge import judge
from placement.problem import Assignment, Demand, Problem
from placement.settings import RoundSettings
from placement.wish import Wish

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class UnitReason:
    """What is known of one unit's count."""

    now: int
    wanted: int
    least: int
    most: int
    load: str
    """Its busiest slice, in words; empty where no rows are expected."""
    idle_s: float | None
    """Seconds without a row, where that decides."""
    settings: RoundSettings

    def __str__(self) -> str:
        if self.idle_s is not None and self.now <= self.least:
            return f"no row for {self.idle_s:.0f} s" + self._kept()
        load = self.load or "no rows are expected"
        if self.now < min(self.wanted, self.most):
            return f"{load}; {self.wanted} would save less than {self.settings.placement.hysteresis:.0%}"
        if self.now > self.wanted and self.now == self.least:
            return f"{load}; {self.wanted} would do" + self._kept()
        if self.now > self.wanted:
            return f"{load}; {self.wanted} would do, if that holds for {self.settings.cool_down_s:g} s"
        if self.now and self.now == self.most:
            return f"{load}; no more than {self.most} by max_replicas or the cores there are"
        return load if self.now else f"{load}; less than keeping the memory is worth, so the gateway computes them"

    def _kept(self) -> str:
        return f"; min_replicas keeps {self.now}" if self.now else ""


def unit_reasons(
    grid: Grid, demand: Demand, wish: Wish, counts: Ints, idle_s: Floats, settings: RoundSettings
) -> dict[str, str]:
    """Unit's name -> why it has so many; `idle_s` [U] is NaN where that does not matter."""
    loads = _loads(grid, demand, wish.work)
    return {
        unit.name: str(
            UnitReason(
                int(counts[at]),
                int(wish.units[at]),
                int(wish.least[at]),
                int(wish.most[at]),
                loads[at],
                None if np.isnan(idle_s[at]) else float(idle_s[at]),
                settings,
            )
        )
        for at, unit in enumerate(grid.units)
    }


def whole_reason(
    grid: Grid, problem: Problem, decided: Assignment, counts: Ints, settings: RoundSettings, *, quiet: bool
) -> str:
    """The plan's reason."""
    mib = problem.slice_bytes / _MIB
    limit = settings.placement.max_bytes
    budget = "" if limit is None else f" of {limit / _MIB:.4g}"
    text = (
        f"{settings.method}: {int(counts.sum())} replicas of {int((counts > 0).sum())} units, "
        f"{len(decided.copies)} copies of slices in {len(decided.copies) * mib:.4g}{budget} MiB"
    )
    if len(decided.added) or len(decided.dropped):
        text += f"; {len(decided.added)} to load, {len(decided.dropped)} to forget"
    if quiet:
        return f"{text}; nothing runs"
    layer_s = judge(problem, decided).layer_s
    slowest = int(np.argmax(layer_s))
    return f"{text}; layer {grid.layers[slowest]} takes longest, {1000 * layer_s[slowest]:.3g} ms a step"


def _loads(grid: Grid, demand: Demand, work: Floats) -> list[str]:
    """[U] the busiest slice of each unit, in words."""
    order = np.argsort(work, axis=None, kind="stable")
    busiest = np.zeros(len(grid.units), dtype=np.int64)
    busiest[grid.unit.reshape(-1)[order]] = order  # the last written is the busiest
    words = []
    for at in busiest:
        row, expert = divmod(int(at), work.shape[1])
        text = (
            f"expert {expert} gets {demand.high[row, expert]:.3g} rows a step in layer {grid.layers[row]}, "
            f"{1000 * work[row, expert]:.3g} ms of work"
        )
        words.append(text if demand.high[row, expert] > 0 else "")
    return words
