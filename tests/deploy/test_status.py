"""What `evermoe status` prints of a report."""

from __future__ import annotations

import io
import time
from typing import Any

from rich.console import Console

from deploy.status import warm_up
from deploy.status_table import print_status

LAYER = {
    "layer": 3,
    "method": "lightgbm",
    "reason": "lightgbm: error 0.05 on validation",
    "error": 0.0512,
    "expected": [10.0, 30.0, 60.0],
    "p90": [20.0, 40.0, 80.0],
    "forecast": [0.1, 0.3, 0.6],
    "actual": [10, 50, 40],
}
FORECAST: dict[str, Any] = {
    "made_at": 0.0, "horizon_s": 3.0, "gateway": "g", "steps": 700, "model": 4, "trained_steps": 500,
    "training": "when the forecast drifts", "layers": [LAYER],
}  # fmt: skip


REPLICA: dict[str, Any] = {
    "id": "r", "pid": 1, "node": "0123456789abcdef", "device": "cpu", "slices": [[0, 0], [1, 0]], "draining": False,
}  # fmt: skip
UNIT: dict[str, Any] = {
    "unit": "expert-0", "planned": 2, "ready": 1, "reason": "expert 0 is hot", "slices": 2, "resident_slices": 2,
    "resident_bytes": 3 << 20, "rows": 300, "replicas": [REPLICA], "calls": {"replica": 7, "inline": 5, "retry": 1},
}  # fmt: skip


def printed(forecast: dict[str, Any] | None = None, *units: dict[str, Any], width: int = 150, why: bool = False) -> str:
    gateway = {"running": 1, "waiting": 0, "inline_rows": 9, "inline_bytes": 1 << 20, "policy_version": 3}
    report = {
        "model": "m", "gateways": [gateway], "units": list(units), "forecast": forecast,
        "plan": {"epoch": 4, "made_at": time.time() - 7, "reason": "evermoe: all is well"},
        "policy": {"version": 4, "made_at": 0.0}, "warm_pool": {"wanted": 2, "ready": 1},
    }  # fmt: skip
    text = io.StringIO()
    print_status(report, Console(file=text, width=width), why=why)
    return text.getvalue()


def row(said: str, unit: str) -> list[str]:
    (line,) = [line for line in said.splitlines() if line.startswith(f"│ {unit} ")]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_the_whole_comes_first() -> None:
    lines = printed(None, UNIT).splitlines()
    assert lines[:5] == [
        "m: 1 gateway(s), 1 running, 0 waiting; 1 of 2 expert replicas ready; 1 of 2 warm workers",
        "plan 4, 7 s ago: evermoe: all is well",
        "rows: 300 computed by the replicas there are now, 9 inline by gateways",
        "resident weights: 3.0 MiB in replicas, 1.0 MiB in gateways",
        "policy version 4; 1 gateway(s) do not go by it yet",
    ]


def test_each_unit_has_a_row_that_fits_a_narrow_terminal() -> None:
    other = {**UNIT, "unit": "expert-1", "rows": 100, "replicas": [], "ready": 0, "resident_slices": 0, "calls": {}}
    said = printed(None, UNIT, other, width=80)
    assert row(said, "expert-0") == ["expert-0", "1/2", "cpu", "2/2", "3.0", "75%", "7 + 5, 1 again"]
    assert row(said, "expert-1") == ["expert-1", "0/2", "-", "0/2", "3.0", "25%", "0 + 0"]


def test_what_is_out_of_the_ordinary_is_told() -> None:
    going = {**REPLICA, "draining": True, "node": "fedcba9876543210", "slices": [[1, 0]]}
    emulated = {**REPLICA, "device": "emulated (2000 rows/s, 1.5 ms)"}
    said = printed(None, {**UNIT, "replicas": [emulated, going], "resident_slices": 1})
    assert row(said, "expert-0")[1:4] == [
        "1/2 (1 going)", "emulated (2000 rows/s, 1.5 ms) 01234567, cpu fedcba98", "1/2 (layers 0-1)",
    ]  # fmt: skip


def test_reasons_are_told_when_asked_for() -> None:
    assert "is hot" not in printed(None, UNIT)
    assert "expert-0: expert 0 is hot" in printed(None, UNIT, why=True)


def test_of_very_many_units_the_busiest_are_shown() -> None:
    many = [{**UNIT, "unit": f"expert-{number}", "rows": number} for number in range(100)]
    said = printed(None, *many)
    assert "│ expert-99 " in said
    assert "│ expert-59 " not in said
    assert "and 60 units with fewer rows" in said


def test_the_forecast_stands_beside_what_came() -> None:
    said = printed({**FORECAST, "made_at": time.time() - 2})
    assert "forecast of the next 3 s (2 s ago): predictor version 4, 700 steps seen" in said
    [row] = [line for line in said.splitlines() if "lightgbm" in line]
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == ["3", "lightgbm", "0.051", "2 60%, 1 30%, 0 10%", "1 50%, 2 40%, 0 10%", "100 (140)"]


def test_a_forecast_without_a_model_says_so() -> None:
    layer = {**LAYER, "method": "average", "error": None, "forecast": [], "actual": []}
    said = printed({**FORECAST, "model": 0, "layers": [layer]})
    assert "no trained predictor yet" in said
    assert "average" in said


def test_without_a_planner_there_is_nothing_to_show() -> None:
    assert "forecast" not in printed(None)


def test_an_emulated_device_is_called_one() -> None:
    emulated = {**UNIT, "replicas": [{**REPLICA, "device": "emulated (2000 rows/s, 1.5 ms)"}]}
    assert warm_up({"units": [UNIT]}) == "1 of 2 expert replicas ready"
    said = warm_up({"units": [emulated]})
    assert said == "1 of 2 expert replicas ready on emulated (2000 rows/s, 1.5 ms) devices"
