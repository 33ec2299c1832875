"""`evermoe status`: what a running service says of its experts."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

from rich.console import Console
from rich.table import Table

_TIMEOUT_S = 10.0


class StatusError(RuntimeError):
    """The service can't be asked; the message is one line for the operator."""


def fetch_status(url: str) -> dict[str, Any]:
    """The status report of the service at `url`; raise StatusError where none answers with one."""
    address = url.rstrip("/") + "/evermoe/status"
    if not address.startswith(("http://", "https://")):
        raise StatusError(f"{url!r} is no URL: give --url http://HOST:PORT")
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT_S) as answer:
            report = json.load(answer)
    except urllib.error.HTTPError as error:
        raise StatusError(f"{address} answered {error.code} {error.reason}: {_said(error)}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise StatusError(
            f"{address} does not answer ({reason}): start it with `evermoe serve`, or give --url"
        ) from error
    return dict(report)


def _said(error: urllib.error.HTTPError) -> str:
    """What the service itself says of it."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, LookupError, TypeError, OSError):
        return "is an Evermoe service listening there?"


def warm_up(report: dict[str, Any]) -> str:
    """How many of the planned expert replicas are ready, in words."""
    units = report["units"]
    if any(unit["planned"] is None for unit in units):
        return "expert replicas about to start"
    ready, planned = sum(unit["ready"] for unit in units), sum(unit["planned"] for unit in units)
    if not planned:
        return "no expert replicas planned"
    return f"{ready} of {planned} expert replicas ready{_emulation(report)}"


def _emulation(report: dict[str, Any]) -> str:
    """What has to be said of devices that are not there."""
    devices = {replica["device"] for unit in report["units"] for replica in unit["replicas"]}
    return "".join(f" on {device} devices" for device in sorted(devices) if device.startswith("emulated"))


def is_warm(report: dict[str, Any]) -> bool:
    """Whether every unit has the replicas that the plan has for it."""
    return all(unit["planned"] is not None and unit["ready"] >= unit["planned"] for unit in report["units"])


def print_status(report: dict[str, Any], console: Console) -> None:
    """Print the report as one line on the gateways and a table of the expert units."""
    running = sum(gateway["running"] for gateway in report["gateways"])
    waiting = sum(gateway["waiting"] for gateway in report["gateways"])
    console.print(
        f"[bold]{report['model']}[/]: {len(report['gateways'])} gateway(s), {running} running, {waiting} waiting, "
        + warm_up(report)
    )
    table = Table("unit", "ready/planned", "node", "resident", "MiB", "calls")
    for unit in report["units"]:
        nodes = sorted({replica["node"][:8] for replica in unit["replicas"]})
        layers = sorted({layer for replica in unit["replicas"] for layer, _ in replica["slices"]})
        memory = sum(replica["resident_bytes"] for replica in unit["replicas"]) / (1 << 20)
        resident = f"layers {_ranges(layers)}" if layers else ""
        calls = ", ".join(f"{path} {count}" for path, count in sorted(unit["calls"].items()))
        planned = "-" if unit["planned"] is None else unit["planned"]
        cells = (unit["unit"], f"{unit['ready']}/{planned}", " ".join(nodes), resident, f"{memory:.1f}", calls)
        table.add_row(*(cell or "-" for cell in cells))
    console.print(table)
    if report.get("forecast") is not None:
        _print_forecast(report["forecast"], console)


def _print_forecast(forecast: dict[str, Any], console: Console) -> None:
    """What was expected beside what came, for each layer."""
    model = f"predictor version {forecast['model']}" if forecast["model"] else "no trained predictor yet"
    age = max(time.time() - forecast["made_at"], 0.0)
    console.print(
        f"forecast of the next {forecast['horizon_s']:g} s ({age:.0f} s ago): {model}, {forecast['steps']} steps seen, "
        f"training {forecast['training']}",
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


def _ranges(numbers: list[int]) -> str:
    """``0-3, 5`` for [0, 1, 2, 3, 5]."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
