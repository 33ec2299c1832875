"""Static expert parallelism: every expert has one device for good. Pure."""

from __future__ import annotations

import numpy as np

from placement.problem import Assignment, Copies, Problem, ProblemError


def static(problem: Problem) -> Assignment:
    """Experts in order, as many on each device as on any other; raise ProblemError where they don't fit."""
    layers, experts, devices = problem.shape
    if not devices:
        return Assignment.of(problem, Copies.none())
    device = np.arange(experts) * devices // max(experts, 1)
    if (np.bincount(device, minlength=devices) * layers > problem.slots).any():
        raise ProblemError(f"static placement needs memory for {-(-experts // devices) * layers} slices on each device")
    layer, expert = np.divmod(np.arange(layers * experts), max(experts, 1))
    return Assignment.of(problem, Copies.of(layer, expert, device[expert], np.ones(layers * experts)))
