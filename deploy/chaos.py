"""`evermoe chaos`: plays a scenario and prints what clients noticed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from recovery.chaos.play import Outcome, play
from recovery.chaos.scenario import ScenarioError, load_scenario
from recovery.chaos.service import Service


def run_chaos(file: Path, url: str, seed: int | None, out: Path | None, console: Console) -> bool:
    """Whether no client saw an error or a changed token, and all was whole again at the end; raise ScenarioError."""
    scenario = load_scenario(file)
    if seed is not None:
        scenario = scenario.model_copy(update={"seed": seed})
    if out is not None and not out.parent.is_dir():
        raise ScenarioError(f"--out {out}: there is no folder {out.parent}")
    outcome = play(scenario, Service(url))
    if out is not None:
        out.write_text(json.dumps(outcome.as_json(), indent=1))
    _print(outcome, console)
    return outcome.passed


def _print(outcome: Outcome, console: Console) -> None:
    table = Table("at", "event", "hit", "gap", "longest gap later", "whole again after")
    for happening in outcome.happenings:
        whole = "-" if happening.whole_after_s is None else f"{happening.whole_after_s:.1f} s"
        hit = happening.hit[0] if len(happening.hit) == 1 else f"{len(happening.hit)} processes"
        gaps = (f"{1000 * happening.gap_s:.0f} ms", f"{1000 * happening.longest_gap_s:.0f} ms")
        table.add_row(f"{happening.at:.1f} s", happening.what, hit, *gaps, whole)
    console.print(table)
    console.print(
        f"{outcome.scenario['name']}: {outcome.requests} requests, {len(outcome.errors)} errors, {outcome.changed} "
        f"changed, {outcome.tokens} tokens in {outcome.seconds:.0f} s; gaps p50 {1000 * outcome.gap_p50_s:.0f} ms, "
        f"p99 {1000 * outcome.gap_p99_s:.0f} ms, longest {1000 * outcome.longest_gap_s:.0f} ms; "
        + ("whole at the end" if outcome.whole else "[bold red]not whole at the end[/]"),
        highlight=False,
    )
    for error, count in Counter(outcome.errors).most_common(3):
        console.print(f"  {count} x {error}", highlight=False, markup=False)
