"""The Serve autoscaling policy of the planner: one, once the gateway has published the first plan.

A process that starts beside the gateway would take the cores from the first request. As `experts.autoscaling`, Serve
ships this module by value and calls it ten times a second.
"""

from __future__ import annotations

from typing import Any

from recovery.plans import plan_reader


class OncePlanned:
    """Asks for one replica as soon as there is a plan."""

    def __init__(self, redis_url: str, namespace: str) -> None:
        self._redis_url = redis_url
        self._namespace = namespace

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """Serve's interface: the context in, (replicas, state to keep) out."""
        there = plan_reader(self._redis_url, self._namespace).plan is not None
        return (1 if there else ctx.target_num_replicas), {}
