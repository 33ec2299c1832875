"""Static expert parallelism: every expert has its devices for good. Pure."""

from __future__ import annotations

import numpy as np

from placement.problem import Assignment, Copies, Problem, ProblemError


def static(problem: Problem) -> Assignment:
    """The experts of a unit are dealt to its devices in turn, alike in all layers, and rows are split evenly.

    Where there are more devices than experts, the experts are dealt again. Raise ProblemError where they don't fit.
    """
    layers, experts, devices = problem.shape
    own = problem.devices.unit if problem.bound else np.zeros(devices, dtype=np.int64)
    slices = problem.unit if problem.bound else np.zeros((layers, experts), dtype=np.int64)
    copies = [
        (layer, expert, device)
        for unit in np.unique(own)
        for layer in range(layers)
        for expert, device in _dealt(np.nonzero(slices[layer] == unit)[0].tolist(), np.nonzero(own == unit)[0].tolist())
    ]
    held = np.bincount([device for _, _, device in copies], minlength=devices)
    if (held > problem.slots).any():
        raise ProblemError(f"static placement needs memory for {held.max()} slices on each device")
    found = Copies.of_sequence(copies)
    number = found.layer * experts + found.expert
    share = 1 / np.bincount(number, minlength=1)[number] if len(found) else found.share
    return Assignment.of(problem, Copies(found.layer, found.expert, found.device, share))


def _dealt(experts: list[int], devices: list[int]) -> list[tuple[int, int]]:
    """(expert, device) pairs."""
    if not experts or not devices:
        return []
    turns = range(max(len(experts), len(devices)))
    return [(experts[turn % len(experts)], devices[turn % len(devices)]) for turn in turns]
