"""The Serve autoscaling policy of expert deployments: does what the plan says.

It runs in Serve's controller loop, for every deployment ten times a second: it only reads a cached plan. Serve ships
this module by value, so everything it remembers lives elsewhere (`recovery.plans`).
"""

from __future__ import annotations

from typing import Any

from recovery.plans import plan_reader


class PlannedReplicas:
    """Asks for as many replicas of `unit` as the plan has; without a plan, for what there is."""

    def __init__(self, redis_url: str, namespace: str, unit: str) -> None:
        self._redis_url = redis_url
        self._namespace = namespace
        self._unit = unit

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Serve's interface: the context in, (replicas, state to keep) out."""
        plan = plan_reader(self._redis_url, self._namespace).plan
        wanted = ctx.target_num_replicas if plan is None else plan.replicas.get(self._unit, ctx.target_num_replicas)
        return wanted, {}
