"""What differs between two policies, and which of that a running service can take over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from placement.policy.policy import Policy
from placement.policy.section import Section

LIVE = (
    "experts.replicas", "experts.min_replicas", "experts.max_replicas", "experts.min_rows_per_replica",
    "gateway.max_waiting", "gateway.inline", "gateway.call_deadline_s",
    "predictor.interval_s", "predictor.horizon_s", "predictor.train", "planner", "overrides",
)  # fmt: skip
"""Keys, and sections with all of theirs, that change without a restart."""


@dataclass(frozen=True)
class Change:
    """A key, by its place in the file, and its values as YAML would have them."""

    key: str
    old: Any
    new: Any

    @property
    def live(self) -> bool:
        """Whether a running service takes it over."""
        return any(self.key == live or self.key.startswith(f"{live}.") for live in LIVE)


def changes(old: Policy, new: Policy) -> list[Change]:
    """The keys whose values differ, in the order of the file; a list counts as one value."""
    before, after = values(old), values(new)
    return [Change(key, before[key], after[key]) for key in after if before[key] != after[key]]


def values(policy: Policy) -> dict[str, Any]:
    """Key -> value as YAML has it; keys by their place in the file, of listed items only what is not the default."""
    return dict(_values(policy))


def _values(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in type(section).model_fields:
        value = getattr(section, key)
        if isinstance(value, Section):
            yield from _values(value, f"{prefix}{key}.")
        else:
            yield prefix + key, section.model_dump(mode="json", include={key}, exclude_defaults=_lists(value)).get(key)


def _lists(value: Any) -> bool:
    return isinstance(value, tuple) and any(isinstance(item, Section) for item in value)
