"""The report of a service's state, `/evermoe/status`: what stands in the directory, and what gateways say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from gateway.messages import GatewayStatus
from placement import forecast, plan, warm_pool
from placement.plan import Plan
from placement.policy import PolicyError
from placement.policy.bounds import unit_bounds
from placement.policy.published import PublishedPolicy
from placement.unit import Unit, make_units
from recovery.directory import Directory, GatewayEntry, ReplicaEntry
from recovery.policies import read_policy

T = TypeVar("T")

_HIDDEN = ("unit", "host", "addresses", "fingerprint")
"""Of a replica's entry: its unit is known, and how it is reached is nobody's business."""


def make_report(model: str, directory: Directory, answers: Sequence[GatewayStatus]) -> dict[str, Any]:
    """The report; `answers` are the gateways' own. Raises Redis errors."""
    published, replicas = read_policy(directory), directory.replicas()
    decided = _decode(directory.read(plan.DOCUMENT), Plan)
    units, wanted = _wanted(published, decided)
    names = units.keys() | wanted.keys() | {name for answer in answers for name in answer.expert_calls}
    return {
        "model": model,
        "directory": {"namespace": directory.namespace, "socket": _socket(directory.url)},
        "policy": None if published is None else {"version": published.version, "made_at": published.made_at},
        "plan": None if decided is None else _summary(decided),
        "warm_pool": _plain(_decode(directory.read(warm_pool.DOCUMENT), warm_pool.WarmWorkers)),
        "forecast": _plain(_decode(directory.read(forecast.DOCUMENT), forecast.LoadForecast)),
        "gateways": _gateways(answers, directory.gateways()),
        "units": [
            {
                "unit": name,
                "planned": wanted.get(name),
                "reason": "" if decided is None else decided.reasons.get(name, ""),
                "slices": len(units[name].experts) * len(units[name].layers) if name in units else None,
                **_fleet([replica for replica in replicas if replica.unit == name]),
                "calls": _sum(answer.expert_calls.get(name, {}) for answer in answers),
            }
            for name in sorted(names, key=_by_number)
        ],
    }


def _fleet(replicas: list[ReplicaEntry]) -> dict[str, Any]:
    """A unit's replicas: those that are told to go are listed, and not counted as ready."""
    return {
        "ready": sum(not replica.draining for replica in replicas),
        "resident_slices": len({place for replica in replicas for place in replica.slices}),
        "resident_bytes": sum(replica.resident_bytes for replica in replicas),
        "rows": sum(replica.rows for replica in replicas),
        "replicas": [
            {key: value for key, value in _plain(replica).items() if key not in _HIDDEN} for replica in replicas
        ],
    }


def _gateways(answers: Sequence[GatewayStatus], entries: Sequence[GatewayEntry]) -> list[dict[str, Any]]:
    known = {entry.id: entry for entry in entries}
    shown = ("pid", "node", "inline_read_s", "inline_row_s", "call_s")
    return [
        {**{key: getattr(known[answer.gateway], key) for key in shown}, **msgspec.to_builtins(answer)}
        for answer in answers
        if answer.gateway in known
    ]


def _summary(decided: Plan) -> dict[str, Any]:
    return {"epoch": decided.epoch, "made_at": decided.made_at, "reason": decided.reason}


def _wanted(published: PublishedPolicy | None, decided: Plan | None) -> tuple[dict[str, Unit], dict[str, int]]:
    """The units, and how many replicas they should have: as planned, within the bounds of the policy."""
    wanted = {} if decided is None else dict(decided.replicas)
    if published is None:
        return {}, wanted
    try:
        policy = published.read()
    except PolicyError:  # of another release
        return {}, wanted
    model = published.model
    units = {unit.name: unit for unit in make_units(policy.experts.unit, model.experts, model.layers)}
    for name in wanted.keys() & units.keys():
        wanted[name] = unit_bounds(policy, units[name]).clamp(wanted[name])
    return units, wanted


def _socket(url: str) -> str | None:
    """Where Redis is, if only this host reaches it: other addresses may hold a password."""
    return url if url.startswith("unix:") else None


def _decode(document: bytes | None, kind: type[T]) -> T | None:
    """What a document says; None where there is none that can be read."""
    try:
        return None if document is None else msgspec.json.decode(document, type=kind)
    except msgspec.DecodeError:  # left by another release
        return None


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value)


def _sum(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for path, calls in count.items():
            total[path] = total.get(path, 0) + calls
    return total


def _by_number(unit: str) -> list[str | int]:
    """expert-2 before expert-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", unit)]
