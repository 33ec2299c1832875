"""How few and how many copies a slice, and replicas a unit, may have: `experts` and `overrides` together."""

from __future__ import annotations

from dataclasses import dataclass

from placement.policy.policy import Policy
from placement.unit import Unit


@dataclass(frozen=True, slots=True)
class Bounds:
    """Fewest and most copies."""

    least: int
    most: int

    def clamp(self, count: int) -> int:
        """The nearest count within these bounds."""
        return max(self.least, min(count, self.most))


def slice_bounds(policy: Policy, layer: int, expert: int) -> Bounds:
    """Of the slice's copies. At least one where it is pinned, or where the gateway computes nothing itself."""
    least, most = policy.experts.min_replicas, policy.experts.max_replicas
    needed = policy.gateway.inline == "never"
    for override in policy.overrides:
        if override.covers(layer, expert):
            least = least if override.min_replicas is None else override.min_replicas
            most = most if override.max_replicas is None else override.max_replicas
            needed = needed or override.pin
    least = max(least, needed)
    return Bounds(least, max(least, most))


def unit_bounds(policy: Policy, unit: Unit) -> Bounds:
    """Of the unit's replicas: enough for the slice that needs most, and no more than its most wanted slice may have."""
    bounds = [slice_bounds(policy, layer, expert) for layer in unit.layers for expert in unit.experts]
    return Bounds(max(each.least for each in bounds), max(each.most for each in bounds))
