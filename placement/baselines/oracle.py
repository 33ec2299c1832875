"""The oracle: our own planning, told the next window's rows, with memory moved for nothing. Pure."""

from __future__ import annotations

import dataclasses

from placement.placer import plan
from placement.problem import Assignment, Demand, Problem
from placement.settings import PlacementSettings


def oracle(problem: Problem, following: Demand, settings: PlacementSettings) -> Assignment:
    """The plan for what comes (`following`): no head-room, no bound on moves, as even as can be."""
    known = Demand.of(following.rows, steps_per_s=following.steps_per_s)
    free = dataclasses.replace(settings, imbalance=1.0, max_moved_bytes=None, hysteresis=0.0)
    return plan(dataclasses.replace(problem, demand=known), free)
