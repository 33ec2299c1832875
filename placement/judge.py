"""What an assignment is worth under some demand: the same measures for every method. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.arrays import Floats
from placement.filling import lower_bound
from placement.problem import Assignment, Problem, copy_counts
from placement.work import work_seconds


@dataclass(frozen=True, eq=False, slots=True)
class Verdict:
    """How long layers take, and what that is compared with."""

    layer_s: Floats
    """[L] seconds: the slowest device, or the gateway's inline slices if those take longer."""
    device_s: Floats
    """[L, D] seconds of each device, its call included; 0 where it gets no rows."""
    bound_s: Floats
    """[L] no assignment is faster: all work spread over all devices like a liquid."""
    inline: int
    """Slices with rows and without a copy."""
    resident_bytes: int


def judge(problem: Problem, assignment: Assignment) -> Verdict:
    """The verdict on `assignment` with the problem's mean rows (what is real, when a window has passed)."""
    layers, experts, devices = problem.shape
    copies, rows = assignment.copies, problem.demand.rows
    got = rows[copies.layer, copies.expert] * copies.share
    seconds = work_seconds(problem.speed, got) / problem.devices.speed[copies.device]
    device_s = np.bincount(copies.layer * devices + copies.device, weights=seconds, minlength=layers * devices)
    by_device: Floats = device_s.astype(np.float64).reshape(layers, devices)
    by_device = np.where(by_device > 0, by_device + problem.devices.call_s, 0.0)
    inline = copy_counts(copies, layers, experts) == 0
    inline_s = (work_seconds(problem.inline, rows) * inline).sum(axis=1)
    work = (work_seconds(problem.speed, rows) * ~inline).sum(axis=1)
    return Verdict(
        np.maximum(by_device.max(axis=1, initial=0.0), inline_s),
        by_device,
        lower_bound(work, problem.devices.call_s, problem.devices.speed),
        int((inline & (rows > 0)).sum()),
        len(copies) * problem.slice_bytes,
    )
