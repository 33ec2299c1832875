"""A scenario: what is broken when, while which load runs. Read from YAML."""

from __future__ import annotations

import difflib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Deed = Literal["kill", "stop", "slow", "corrupt", "partition"]
Role = Literal["expert", "gateway", "api", "planner", "controller", "redis"]


class ScenarioError(ValueError):
    """The scenario can't be played; the message is one line for the operator."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoadPlan(_Section):
    """What clients ask meanwhile."""

    streams: int = Field(default=4, ge=1, le=256)
    """Answers at a time."""
    max_tokens: int = Field(default=60, ge=2, le=4096)
    requests: int = Field(default=8, ge=1, le=1000)
    """Different requests, asked again and again; every second one draws its tokens, with a seed."""


class EventPlan(_Section):
    """Something that is broken, once or again and again."""

    at: float = Field(ge=0)
    """Seconds after the load began."""
    do: Deed
    """kill (SIGKILL), stop (SIGSTOP, for a while), slow (stopped part of the time), corrupt (garbage to the port),
    partition (a network device that is down)."""
    to: Role | None = None
    unit: str | None = None
    """Only replicas of this expert unit."""
    count: int | Literal["all"] = 1
    """Processes, chosen by the scenario's seed."""
    seconds: float = Field(default=3.0, gt=0, le=600)
    """How long it lasts; a kill and garbage are over at once."""
    factor: float = Field(default=4.0, gt=1, le=100)
    """How many times slower."""
    device: str | None = None
    """The network device of a partition."""
    every: float | None = Field(default=None, gt=0)
    """Again after so many seconds, until the scenario ends."""

    @model_validator(mode="after")
    def _makes_sense(self) -> EventPlan:
        if self.do == "partition" and self.device is None:
            raise ValueError(
                "processes of one host talk over Unix sockets and shared memory, which can't be cut: give the network "
                "`device` between two hosts (or network namespaces)"
            )
        if self.do != "partition" and self.to is None:
            raise ValueError(f"say `to` whom: {', '.join(get_args(Role))}")
        if self.do == "corrupt" and self.to not in ("expert", "gateway"):
            raise ValueError("only an expert or a gateway has a data port to send garbage to")
        if isinstance(self.count, int) and self.count < 1:
            raise ValueError("count is a number above 0, or all")
        return self


class Scenario(_Section):
    """A whole scenario."""

    name: str = "scenario"
    seed: int = 0
    seconds: float = Field(default=20.0, gt=0, le=36_000)
    """How long the load runs."""
    settle: float = Field(default=60.0, ge=0)
    """How long the service then has to be whole again."""
    load: LoadPlan = LoadPlan()
    events: tuple[EventPlan, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _within(self) -> Scenario:
        late = next((event for event in self.events if event.at >= self.seconds), None)
        if late is not None:
            raise ValueError(f"an event at {late.at:g} s comes after the end ({self.seconds:g} s)")
        return self

    def schedule(self) -> list[Moment]:
        """Everything that happens, in order."""
        moments = []
        for number, event in enumerate(self.events):
            at = event.at
            while at < self.seconds:
                moments.append(Moment(at, event, random.Random(f"{self.seed} {number} {at}").random()))
                if event.every is None:
                    break
                at += event.every
        return sorted(moments, key=lambda moment: moment.at)


@dataclass(frozen=True)
class Moment:
    """One event at its time; `draw` in [0, 1) decides whom it hits."""

    at: float
    event: EventPlan
    draw: float


def load_scenario(path: Path) -> Scenario:
    """The scenario of a YAML file; raise ScenarioError naming file, key and remedy."""
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ScenarioError(f"{path}: can't be read ({error.strerror}): give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return parse_scenario(document, str(path))


def parse_scenario(document: Any, name: str) -> Scenario:
    """The scenario of a parsed document, which `name` stands for in errors."""
    if not isinstance(document, dict):
        raise ScenarioError(f"{name}: a scenario is a mapping with {', '.join(Scenario.model_fields)}")
    try:
        return Scenario.model_validate({"name": Path(name).stem, **document})
    except ValidationError as error:
        raise ScenarioError(f"{name}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        sections: dict[str, type[BaseModel]] = {"load": LoadPlan, "events": EventPlan}
        section = sections.get(str(first["loc"][0]), Scenario) if len(first["loc"]) > 1 else Scenario
        near = difflib.get_close_matches(str(first["loc"][-1]), section.model_fields, n=1, cutoff=0.5)
        known = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(section.model_fields)}"
        return f"unknown key '{where}': {known}"
    reason = first["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason
