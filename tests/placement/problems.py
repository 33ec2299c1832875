"""Problems for tests: small ones made by hypothesis, and simple ones made by hand."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from placement.cost import Speed
from placement.problem import Copies, Demand, Devices, Problem

SLICE = 1000
COMPUTE = Speed(read_s=0.0, row_s=1e-3)
"""Only rows count."""
MEMORY = Speed(read_s=20e-3, row_s=1e-3)
"""Up to 20 rows take what reading the weights takes."""


def problem(
    rows: ArrayLike,
    slots: ArrayLike,
    *,
    cost: Speed = COMPUTE,
    resident: Copies | None = None,
    steps_per_s: float = 1.0,
    unit: ArrayLike | None = None,
    device_unit: ArrayLike = -1,
    **devices: ArrayLike,
) -> Problem:
    """A problem with so many slots on each device."""
    return Problem.of(
        Demand.of(rows, steps_per_s=steps_per_s),
        Devices.of(np.asarray(slots) * SLICE, unit=device_unit, **devices),
        slice_bytes=SLICE,
        speed=cost,
        resident=resident,
        unit=unit,
    )


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to 4 layers, 7 experts and 6 unlike devices, with something resident."""
    layers, experts, devices = draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = random.choice([0.0, 0.3, 1.0, 10.0, 100.0], (layers, experts)) * random.random((layers, experts))
    slots = random.integers(0, layers * experts + 2, devices)
    held = random.random((layers, experts, devices)) < draw(st.sampled_from([0.0, 0.1, 0.5]))
    held &= np.cumsum(held.reshape(-1, devices), axis=0).reshape(held.shape) <= slots
    bound = draw(st.booleans())
    return problem(
        rows,
        slots,
        cost=draw(st.sampled_from([COMPUTE, MEMORY])),
        resident=Copies.of(*np.nonzero(held)),
        steps_per_s=draw(st.sampled_from([0.0, 1.0, 50.0])),
        unit=np.tile(np.arange(experts) % 3, (layers, 1)),
        speed=random.choice([0.5, 1.0, 2.0], devices) if draw(st.booleans()) else 1.0,
        node=random.integers(0, 2, devices),
        call_s=random.choice([0.0, 5e-3], devices) if draw(st.booleans()) else 0.0,
        device_unit=random.integers(0, 3, devices) if bound else -1,
    )
