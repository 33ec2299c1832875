"""`evermoe status`: what a running service says of its experts."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

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
