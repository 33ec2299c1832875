"""The Serve autoscaling policy of expert deployments: does what the plan says, within the bounds of the policy.

It runs in Serve's controller loop, for every deployment ten times a second: it only reads a cached plan and policy.
Serve ships this module by value, so everything it remembers lives elsewhere (`recovery.plans`, `recovery.policies`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from placement.unit import Unit
from recovery.plans import plan_reader
from recovery.policies import policy_reader


class PlannedReplicas:
    """Asks for as many replicas of a unit as the plan has; without a plan, for what there is.

    Bounds of the policy that were changed since the plan was made count at once.
    """

    def __init__(
        self, redis_url: str, namespace: str, unit: str, experts: Sequence[int], layers: Sequence[int]
    ) -> None:
        self._redis_url = redis_url
        self._namespace = namespace
        self._unit = Unit(unit, tuple(experts), tuple(layers))

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Serve's interface: the context in, (replicas, state to keep) out."""
        plan = plan_reader(self._redis_url, self._namespace).plan
        bounds = policy_reader(self._redis_url, self._namespace).bounds(self._unit)
        if plan is None:
            return ctx.target_num_replicas, {}
        wanted = plan.replicas.get(self._unit.name, ctx.target_num_replicas)
        return wanted if bounds is None else bounds.clamp(wanted), {}
