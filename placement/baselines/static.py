"""Static expert parallelism: every expert stays on its devices for good. Pure."""

from __future__ import annotations

import numpy as np

from placement.problem import Assignment, Copies, Problem, ProblemError


def static(problem: Problem) -> Assignment:
    """Experts in order, as many on each device as on any other, as many copies of each as fit; rows are split evenly.

    Raise ProblemError where they don't fit once.
    """
    layers, experts, devices = problem.shape
    if not devices:
        return Assignment.of(problem, Copies.none())
    first = np.arange(experts) * devices // max(experts, 1)
    once = np.bincount(first, minlength=devices) * layers
    copies = int((problem.slots // np.maximum(once, 1))[once > 0].min(initial=devices))
    if copies < 1:
        raise ProblemError(f"static placement needs memory for {-(-experts // devices) * layers} slices on each device")
    layer, expert, nth = np.unravel_index(np.arange(layers * experts * copies), (layers, experts, copies))
    device = (first[expert] + nth * devices // copies) % devices
    return Assignment.of(problem, Copies.of(layer, expert, device, np.full(len(layer), 1 / copies)))
