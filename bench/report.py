"""What every benchmark shares: options, rounds that alternate, medians, raw JSON with the machine's description."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

RESULTS = Path(__file__).parent / "results"


def options(description: str) -> argparse.Namespace:
    """Parse ``--quick`` (under a minute) and ``--check`` (exit 1 where the bar is missed)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under a minute")
    parser.add_argument("--check", action="store_true", help="exit 1 where the bar is missed")
    return parser.parse_args()


def alternate(subjects: Mapping[str, Callable[[], object]], rounds: int, block: int) -> dict[str, list[float]]:
    """Seconds of each subject, measured in turn: a machine that gets slower gets slower for all of them.

    Each turn is a `block` of calls, so that what one subject leaves to be done in the background does not count as the
    next one's time (medians leave the first calls of a block out).
    """
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        for name, run in subjects.items():
            for _ in range(block):
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ms(seconds: list[float]) -> float:
    """The median in milliseconds."""
    return 1000 * statistics.median(seconds)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "processor": model[0] if model else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def finish(name: str, raw: dict[str, Any], figure: str, *, passed: bool, check: bool) -> NoReturn:
    """Keep the raw numbers, print the figure as the last line, and exit 1 where the bar is missed and checked."""
    RESULTS.mkdir(exist_ok=True)
    document = {"name": name, "machine": machine(), "figure": figure, "passed": passed, **raw}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1))
    print(figure if passed else f"{figure}  MISSED")
    sys.exit(1 if check and not passed else 0)
