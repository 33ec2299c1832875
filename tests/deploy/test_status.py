"""What `evermoe status` prints of a report."""

from __future__ import annotations

import io
import time
from typing import Any

from rich.console import Console

from deploy.status import print_status, warm_up

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


def printed(forecast: dict[str, Any] | None) -> str:
    gateway = {"running": 1, "waiting": 0}
    text = io.StringIO()
    print_status(
        {"model": "m", "gateways": [gateway], "units": [], "forecast": forecast}, Console(file=text, width=150)
    )
    return text.getvalue()


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


def replica(**figures: Any) -> dict[str, Any]:
    plain = {"node": "0123456789", "slices": [[3, 0], [4, 0]], "device": "cpu", "resident_bytes": 3 << 19}
    return {**plain, **figures}


def status(*replicas: dict[str, Any]) -> dict[str, Any]:
    unit = {"unit": "expert-0", "planned": 2, "ready": len(replicas), "replicas": list(replicas), "calls": {}}
    return {"model": "m", "gateways": [], "units": [unit], "forecast": None}


def test_a_unit_shows_what_its_replicas_hold() -> None:
    text = io.StringIO()
    print_status(status(replica(), replica(slices=[[5, 0]])), Console(file=text, width=150))
    [row] = [line for line in text.getvalue().splitlines() if "expert-0" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "expert-0", "2/2", "01234567", "layers 3-5", "3.0", "-",
    ]  # fmt: skip


def test_an_emulated_device_is_called_one() -> None:
    assert warm_up(status(replica())) == "1 of 2 expert replicas ready"
    said = warm_up(status(replica(device="emulated (2000 rows/s, 1.5 ms)")))
    assert said == "1 of 2 expert replicas ready on emulated (2000 rows/s, 1.5 ms) devices"
