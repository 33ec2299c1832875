"""A policy as YAML, for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from placement.policy.changes import values
from placement.policy.policy import Policy

_COLUMN = 40


def to_yaml(policy: Policy) -> str:
    """The whole policy as a file; keys that are not at their default have a comment with it."""
    return "\n".join(_lines(values(policy), values(Policy()))) + "\n"


def text(value: Any) -> str:
    """A value in one line."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    dumped = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1 << 20)
    return dumped.removesuffix("\n").removesuffix("\n...")


def _lines(chosen: dict[str, Any], defaults: dict[str, Any]) -> Iterator[str]:
    opened: list[str] = []
    for place, value in chosen.items():
        *sections, key = place.split(".")
        for depth, section in enumerate(sections):
            if opened[: depth + 1] != sections[: depth + 1]:
                yield f"{'  ' * depth}{section}:"
                opened = sections[: depth + 1]
        opened = sections
        line = f"{'  ' * len(sections)}{key}: {text(value)}"
        mark = "" if value == defaults[place] else f"  # default: {text(defaults[place])}"
        yield f"{line:<{_COLUMN}}{mark}" if mark else line
