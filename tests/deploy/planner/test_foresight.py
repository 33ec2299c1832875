"""What a record foresees."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from deploy.planner.foresight import Foresight
from predictor.records import Records
from tests.predictor.steps import records


@pytest.fixture(scope="module")
def recorded() -> Records:
    return records(200)


def test_it_says_what_came(recorded: Records) -> None:
    times = recorded.time_s - recorded.time_s[0]
    load = Foresight(recorded, 1.0).expected(2.0)
    window = (times > 2.0) & (times <= 3.0)
    counts = (recorded.prefill_counts + recorded.decode_counts)[window]
    assert (load.rows == counts.sum(axis=0)).all()
    assert (load.p90 == load.rows).all()
    assert load.steps_per_s == window.sum()


def test_after_its_end_nothing_comes(recorded: Records) -> None:
    load = Foresight(recorded, 1.0).expected(1e6)
    assert load.rows.sum() == load.steps_per_s == 0


def test_an_empty_record_is_refused(recorded: Records) -> None:
    columns = {
        field.name: getattr(recorded, field.name)[:0] for field in dataclasses.fields(recorded) if field.name != "shape"
    }
    empty = Records(shape=recorded.shape, **columns)
    assert np.size(empty.time_s) == 0
    with pytest.raises(ValueError, match="without a step"):
        Foresight(empty, 1.0)
