"""A whole policy."""

from __future__ import annotations

from collections.abc import Iterator

from placement.policy.experts import ExpertPolicy, Override
from placement.policy.gateway import ApiPolicy, GatewayPolicy
from placement.policy.planner import PlannerPolicy, PredictorPolicy
from placement.policy.section import Section


class Policy(Section):
    """What the operator of an Evermoe service may decide; every key has a default."""

    experts: ExpertPolicy = ExpertPolicy()
    """How experts are cut into deployments, scaled and run."""
    gateway: GatewayPolicy = GatewayPolicy()
    """The persistent side: attention, scheduling, and what experts it computes itself."""
    api: ApiPolicy = ApiPolicy()
    """The HTTP edge: who may ask, and how much."""
    predictor: PredictorPolicy = PredictorPolicy()
    """What load is expected."""
    planner: PlannerPolicy = PlannerPolicy()
    """What follows from it: how many copies of which slices, and where."""
    overrides: tuple[Override, ...] = ()
    """Other bounds for single experts or layers."""

    @property
    def planned(self) -> bool:
        """Whether plans follow the load; else the first one stays."""
        return self.planner.enabled and self.predictor.enabled

    @property
    def wants_gpu(self) -> bool:
        """Whether it can't do without one."""
        return self.experts.resources.gpu > 0 or self.gateway.device.startswith("cuda")

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """An override with one bound keeps its order with the other bound of `experts`."""
        for number, override in enumerate(self.overrides):
            least, most = override.min_replicas, override.max_replicas
            if most is None and least is not None and least > self.experts.max_replicas:
                remedy = "lower it, or give the override a max_replicas"
                yield (
                    f"overrides.{number}.min_replicas",
                    f"{least} is more than experts.max_replicas ({self.experts.max_replicas}): {remedy}",
                )
            if least is None and most is not None and most < self.experts.min_replicas:
                remedy = "raise it, or give the override a min_replicas"
                yield (
                    f"overrides.{number}.max_replicas",
                    f"{most} is less than experts.min_replicas ({self.experts.min_replicas}): {remedy}",
                )
