"""What Prometheus reads of expert units and their replicas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_PATHS = ("replica", "inline", "hedge", "retry")


def expert_metrics(model: str, units: Sequence[dict[str, Any]]) -> Iterable[Metric]:
    """The figures of a status report's `units`."""
    calls = CounterMetricFamily(
        "evermoe:expert_calls", "Calls of experts, by the path they took.", labels=["model_name", "path"]
    )
    for path in _PATHS:
        calls.add_metric([model, path], sum(unit["calls"].get(path, 0) for unit in units))
    yield calls
    replicas = GaugeMetricFamily(
        "evermoe:expert_replicas", "Replicas of expert units.", labels=["model_name", "expert", "state"]
    )
    resident = GaugeMetricFamily(
        "evermoe:expert_resident_bytes", "Weights that replicas hold.", labels=["model_name", "expert"]
    )
    for unit in units:
        replicas.add_metric([model, unit["unit"], "planned"], unit["planned"] or 0)
        replicas.add_metric([model, unit["unit"], "ready"], unit["ready"])
        replicas.add_metric([model, unit["unit"], "draining"], sum(each["draining"] for each in unit["replicas"]))
        resident.add_metric([model, unit["unit"]], sum(each["resident_bytes"] for each in unit["replicas"]))
    yield replicas
    yield resident
    every = [replica for unit in units for replica in unit["replicas"]]
    misses = CounterMetricFamily(
        "evermoe:expert_misses", "Rows that came for a slice that was not resident.", labels=["model_name"]
    )
    misses.add_metric([model], sum(replica["misses"] for replica in every))
    yield misses
    emulated = GaugeMetricFamily(
        "evermoe:emulated_devices",
        "Replicas whose device is only emulated: times are not those of this machine.",
        labels=["model_name"],
    )
    emulated.add_metric([model], sum(replica["device"].startswith("emulated") for replica in every))
    yield emulated
