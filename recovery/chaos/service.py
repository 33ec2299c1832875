"""The service under test as its operator sees it: its own report, and its processes on this host."""

from __future__ import annotations

import contextlib
import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import psutil
import redis

from experts.wire.sockets import host_id
from recovery.chaos.scenario import EventPlan, ScenarioError
from recovery.directory import Directory, GatewayEntry, ReplicaEntry

_ANSWER_S = 5.0
_TITLES = {
    "api": "ServeReplica:evermoe:api",
    "planner": "ServeReplica:evermoe:planner",
    "controller": "ServeController",
}


@dataclass(frozen=True)
class Target:
    """A process that can be broken."""

    role: str
    name: str
    pid: int
    addresses: tuple[str, ...] = ()


class Service:
    """The service at `url`. Raise ScenarioError where there is none, or none of it on this host."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise ScenarioError(f"{url!r} is no URL: give --url http://HOST:PORT")
        report = self.report()
        if report is None:
            raise ScenarioError(f"{self.url} does not answer: start it with `evermoe serve`, or give --url")
        self.model = str(report["model"])
        self.gateways = len(report["gateways"])
        self._host = host_id()
        self._last = report
        self._directory = _directory(self.url, report)
        self._gateways: list[GatewayEntry] = []
        self._replicas: list[ReplicaEntry] = []
        self._look()
        self._raylet = self._cluster()

    def report(self) -> dict[str, Any] | None:
        """What the service says of itself; None while it can't."""
        try:
            with urllib.request.urlopen(f"{self.url}/evermoe/status", timeout=_ANSWER_S) as answer:
                self._last = dict(json.load(answer))
        except (OSError, ValueError, urllib.error.HTTPError):
            return None
        return self._last

    def whole(self) -> bool:
        """Whether everything that is planned is there."""
        report = self.report()
        if report is None or len(report["gateways"]) < self.gateways:
            return False
        return all(unit["planned"] is None or unit["ready"] >= unit["planned"] for unit in report["units"])

    def pids(self) -> set[int]:
        """The processes of the latest report."""
        replicas = [replica for unit in self._last["units"] for replica in unit["replicas"]]
        return {entry["pid"] for entry in (*self._last["gateways"], *replicas)}

    def targets(self, event: EventPlan) -> list[Target]:
        """All that the event may hit, as far as it is known now; none may be there at this moment."""
        self._look()
        match event.to:
            case "expert":
                found = [
                    Target("expert", f"{entry.unit} {entry.id}", entry.pid, tuple(entry.addresses))
                    for entry in self._replicas
                    if entry.host == self._host and event.unit in (None, entry.unit)
                ]
            case "gateway":
                found = [
                    Target("gateway", entry.id, entry.pid, tuple(entry.addresses))
                    for entry in self._gateways
                    if entry.host == self._host
                ]
            case "redis":
                found = self._named(self._raylet.parent(), "redis-server", "redis")
            case role:
                found = self._named(self._raylet, _TITLES[str(role)], str(role))
        return [target for target in found if psutil.pid_exists(target.pid)]

    def check(self, event: EventPlan) -> None:
        """Raise ScenarioError where there is nobody that the event could hit."""
        if event.do != "partition" and not self.targets(event):
            what = event.to if event.unit is None else f"{event.to} of {event.unit}"
            raise ScenarioError(f"{self.url} has no {what} on this host: start chaos where it runs")

    def _look(self) -> None:
        """Read the directory; where Redis is away, what was there last stays."""
        with contextlib.suppress(redis.RedisError, OSError):
            self._gateways, self._replicas = self._directory.gateways(), self._directory.replicas()

    def _cluster(self) -> psutil.Process:
        """The raylet that the gateways of this host belong to: whatever else Ray runs is below it."""
        for gateway in self._gateways:
            if gateway.host != self._host:
                continue
            with contextlib.suppress(psutil.NoSuchProcess):
                for parent in psutil.Process(gateway.pid).parents():
                    if parent.name() == "raylet":
                        return parent
        raise ScenarioError(f"no gateway of {self.url} runs on this host: start chaos where one does")

    def _named(self, root: psutil.Process | None, title: str, role: str) -> list[Target]:
        found = []
        for process in root.children(recursive=True) if root is not None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()) or title in process.name():
                    found.append(Target(role, role, process.pid))
        return found


def _directory(url: str, report: dict[str, Any]) -> Directory:
    """The service's directory in Redis; raise ScenarioError where it can't be read."""
    address = report["directory"]["socket"] or os.environ.get("REDIS_URL")
    if address is None:
        raise ScenarioError(f"{url} keeps its directory in a Redis of yours: set REDIS_URL to it")
    directory = Directory(address, report["directory"]["namespace"])
    try:
        directory.gateways()
    except (redis.RedisError, OSError) as error:
        raise ScenarioError(f"the directory of {url} can't be read ({error}): set REDIS_URL to its Redis") from error
    return directory
