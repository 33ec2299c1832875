"""The plan as a document: what is written is read, and a plan of the first days still is one."""

import msgspec
import pytest

from placement import plan
from placement.plan import Copy, Plan


def test_a_plan_is_read_as_it_was_written() -> None:
    wanted = Plan(
        epoch=7,
        replicas={"expert-0": 2, "expert-1": 0},
        copies={"a": [Copy(3, 0, 0.25)], "b": [Copy(3, 0, 0.75), Copy(4, 0, 0.0)]},
        reason="expert 0 of layer 3 is hot",
        reasons={"expert-1": "idle for 300 s"},
        made_at=12.5,
    )
    assert plan.decode(plan.encode(wanted)) == wanted


def test_a_plan_without_copies_leaves_residency_alone() -> None:
    assert plan.decode(b'{"epoch": 1, "replicas": {"expert-0": 1}, "reason": "first"}').copies is None


def test_what_is_no_plan_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        plan.decode(b'{"epoch": 1}')
