"""What `evermoe status` prints of a report: some lines on the whole, a table of the units, the forecast."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy.status import warm_up
from placement.policy.fitting import spans

_MOST_UNITS = 40
"""Rows of the table; the rest is in `--json`."""
_COLUMNS: dict[str, Literal["left", "right"]] = {
    "unit": "left", "ready/wanted": "right", "device": "left", "slices": "left", "MiB": "right", "rows": "right",
    "calls + inline": "right",
}  # fmt: skip


def print_status(report: dict[str, Any], console: Console, *, why: bool = False) -> None:
    """Print the report; with `why` also the reason for each unit's number of replicas."""
    for line in _whole(report):
        console.print(line, highlight=False, soft_wrap=True)
    if report["units"]:
        console.print(_units(report))
        rest = len(report["units"]) - _MOST_UNITS
        if rest > 0:
            console.print(f"... and {rest} units with fewer rows (--json has all)")
    for unit in report["units"] if why else ():
        console.print(
            escape(f"{unit['unit']}: {unit['reason'] or 'as the plan says'}"), highlight=False, soft_wrap=True
        )
    if report.get("forecast") is not None:
        _print_forecast(report["forecast"], console)


def _whole(report: dict[str, Any]) -> Iterator[str]:
    gateways, policy, pool, plan = (report[key] for key in ("gateways", "policy", "warm_pool", "plan"))
    running, waiting = (sum(gateway[key] for gateway in gateways) for key in ("running", "waiting"))
    yield (
        f"[bold]{escape(report['model'])}[/]: {len(gateways)} gateway(s), {running} running, {waiting} waiting; "
        f"{warm_up(report)}" + (f"; {_pool(pool)}" if pool and pool["wanted"] else "")
    )
    if plan is not None:
        yield f"plan {plan['epoch']}, {_ago(plan['made_at'])}: {escape(plan['reason'])}"
    inline, held = (sum(gateway[key] for gateway in gateways) for key in ("inline_rows", "inline_bytes"))
    rows, resident = (sum(unit[key] for unit in report["units"]) for key in ("rows", "resident_bytes"))
    yield f"rows: {rows} computed by the replicas there are now, {inline} inline by gateways"
    yield f"resident weights: {_mib(resident)} MiB in replicas, {_mib(held)} MiB in gateways"
    if policy is not None:
        late = sum(gateway["policy_version"] != policy["version"] for gateway in gateways)
        yield f"policy version {policy['version']}" + (f"; {late} gateway(s) do not go by it yet" if late else "")


def _pool(pool: dict[str, int]) -> str:
    return f"{pool['ready']} of {pool['wanted']} warm workers"


def _units(report: dict[str, Any]) -> Table:
    table = Table()
    for name, justify in _COLUMNS.items():
        table.add_column(name, justify=justify, no_wrap=name not in ("device", "slices"))
    total = sum(unit["rows"] for unit in report["units"])
    nodes = {replica["node"] for unit in report["units"] for replica in unit["replicas"]}
    busiest = sorted(report["units"], key=lambda unit: -unit["rows"])[:_MOST_UNITS]
    for unit in (unit for unit in report["units"] if unit in busiest):
        table.add_row(*(escape(cell) or "-" for cell in _cells(unit, total, several_nodes=len(nodes) > 1)))
    return table


def _cells(unit: dict[str, Any], total: int, *, several_nodes: bool) -> Iterator[str]:
    going = sum(replica["draining"] for replica in unit["replicas"])
    planned = "-" if unit["planned"] is None else unit["planned"]
    yield unit["unit"]
    yield f"{unit['ready']}/{planned}" + (f" ({going} going)" if going else "")
    yield _listed(
        replica["device"] + (f" {replica['node'][:8]}" if several_nodes else "") for replica in unit["replicas"]
    )
    yield _slices(unit)
    yield _mib(unit["resident_bytes"])
    yield f"{unit['rows'] / total:.0%}" if total else ""
    yield _calls(unit["calls"])


def _slices(unit: dict[str, Any]) -> str:
    """How many of the unit's slices are resident somewhere, and where it is not all of them, in which layers."""
    resident, slices = unit["resident_slices"], unit["slices"]
    layers = sorted({layer for replica in unit["replicas"] for layer, _ in replica["slices"]})
    missing = f" (layers {spans(layers)})" if resident and resident != slices else ""
    return f"{resident}/{'?' if slices is None else slices}{missing}"


def _calls(calls: dict[str, int]) -> str:
    """By replicas, by gateways, and sent again because a replica was lost."""
    again = calls.get("retry", 0) + calls.get("hedge", 0)
    return f"{calls.get('replica', 0)} + {calls.get('inline', 0)}" + (f", {again} again" if again else "")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f}" if size else "0"


def _ago(moment: float) -> str:
    seconds = max(time.time() - moment, 0.0)
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{seconds / 60:.0f} min ago"


def _print_forecast(forecast: dict[str, Any], console: Console) -> None:
    """What was expected beside what came, for each layer."""
    model = f"predictor version {forecast['model']}" if forecast["model"] else "no trained predictor yet"
    console.print(
        f"forecast of the next {forecast['horizon_s']:g} s ({_ago(forecast['made_at'])}): {model}, "
        f"{forecast['steps']} steps seen, training {forecast['training']}",
        highlight=False,
    )
    table = Table("layer", "method", "error", "hottest forecast", "hottest actual", "rows to come (p90)")
    for layer in forecast["layers"]:
        total = sum(layer["actual"]) or 1
        actual = [count / total for count in layer["actual"]]
        error = "-" if layer["error"] is None else f"{layer['error']:.3f}"
        rows = f"{sum(layer['expected']):.0f} ({sum(layer['p90']):.0f})"
        table.add_row(str(layer["layer"]), layer["method"], error, _hottest(layer["forecast"]), _hottest(actual), rows)
    console.print(table)


def _hottest(shares: list[float]) -> str:
    """The three largest shares, as ``expert share%``."""
    order = sorted(range(len(shares)), key=lambda expert: -shares[expert])[:3]
    return ", ".join(f"{expert} {shares[expert]:.0%}" for expert in order) or "-"
