"""The sections `predictor` and `planner`: what is expected, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from placement.policy.section import Section

QUANTILES = (0.5, 0.9)


class PredictorPolicy(Section):
    """The forecast of expert load."""

    enabled: bool = True
    """Watch what is routed, and forecast it. Without it the planner knows no load, and the first plan stays."""
    interval_s: float = Field(default=1.0, ge=0.1, le=60)
    """Seconds between two forecasts."""
    horizon_s: float = Field(default=3.0, ge=0.1, le=60)
    """How many seconds a forecast looks ahead."""
    models: Path | None = None
    """Folder of trained predictors (`evermoe predictor train`), to begin with and to keep later ones in; null: one in
    the cache, by the model's fingerprint."""
    train: bool = True
    """Learn from the traffic, in the background and at the lowest priority."""


class PlannerPolicy(Section):
    """From the forecast to the plan: how many copies of each slice, where, and with what share of its rows."""

    enabled: bool = True
    """false: the first plan stays."""
    method: Literal["evermoe", "static", "eplb", "eplb-hierarchical", "moeless", "oracle"] = "evermoe"
    """`evermoe`, or a method to compare it with: `static` (every expert as often as any other), `eplb` and
    `eplb-hierarchical` (DeepSeek's), `moeless` (as published), `oracle` (is told the load to come: benchmarks only)."""
    foresight: Path | None = None
    """For the method `oracle`: a routing record (`evermoe serve --record`) of the same traffic, whose loads are taken
    for forecasts; its first row counts as the first one that comes."""
    interval_s: float = Field(default=1.0, ge=0.1, le=3600)
    """Seconds between two plans."""
    memory_mib: float | None = Field(default=None, gt=0)
    """What all replicas' resident slices may take together, MiB; null: what experts.replicas of each unit take, or one
    of each where that is 0."""
    imbalance: float = Field(default=1.05, ge=1)
    """Load of the busiest device over the mean that is good enough; more is evened out."""
    quantile: float = Field(default=0.9, json_schema_extra={"enum": list(QUANTILES)})
    """Load to plan for: 0.5 the expected one, 0.9 one that is exceeded one time in ten."""
    idle_to_zero_s: float | None = Field(default=300.0, ge=0)
    """A unit that had no row for so many seconds goes to its min_replicas; null: never for that reason."""
    hysteresis: float = Field(default=0.2, ge=0, le=1)
    """A copy goes only when it is worth less than this part below its price: keeps it from coming and going."""
    cool_down_s: float = Field(default=10.0, ge=0)
    """Seconds between two changes of a unit's replicas downwards; upwards there is no waiting."""
    max_moves_mib: float | None = Field(default=None, gt=0)
    """Most MiB of weights that one plan makes replicas load; null: no bound."""
    spread_nodes: bool = True
    """Put copies of a hot slice on different nodes, so that losing one node leaves another."""
    gib_worth: float = Field(default=0.0, ge=0)
    """Price of keeping weights resident: seconds of waiting saved per second that one GiB has to be worth. 0: memory
    within the budget is free; higher values give up copies sooner."""
    warm_pool: int = Field(default=0, ge=0, le=256)
    """Worker processes kept started with torch loaded, so that a new replica is there sooner; about 200 MiB each."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Forecasts have two quantiles, and only an oracle has foresight."""
        if (self.method == "oracle") != (self.foresight is not None):
            yield "foresight", "the method oracle, and no other, needs a routing record: give the path of one"
        if self.quantile not in QUANTILES:
            yield "quantile", f"{self.quantile:g} is not forecast: give 0.5 or 0.9"
