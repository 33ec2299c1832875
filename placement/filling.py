"""Water-filling: a slice's seconds go where they are finished first. Pure.

Devices are vessels, as wide as they are fast, filled already by calls (`call_s`: low on the gateway's own host, so rows
go there first) and by other slices. What is poured in stands equally high wherever it reaches; so no copy of a slice
finishes after another that could have taken its rows.
"""

from __future__ import annotations

import numpy as np

from placement.arrays import Bools, Floats, Ints


def fill(work: Floats, group: Ints, base: Floats, speed: Floats) -> Floats:
    """Pour each group's `work` [G] into its vessels [M], `base` full, so many `group`s at once; what each gets, [M].

    Exact: from the level that wets all vessels of a group, those above it are left out until none is.
    """
    groups = len(work)
    wet = np.ones(len(group), dtype=np.bool_)
    while True:
        width = np.bincount(group, weights=speed * wet, minlength=groups)
        volume = np.bincount(group, weights=speed * base * wet, minlength=groups)
        level = (work + volume) / np.maximum(width, 1e-300)
        dry = wet & (base >= level[group]) & (width[group] > speed * (1 + 1e-12))
        if not dry.any():
            return np.where(wet, np.maximum(level[group] - base, 0.0) * speed, 0.0)
        wet &= ~dry


def lower_bound(work: Floats, base: Floats, speed: Floats) -> Floats:
    """[L] the level of each layer's `work` [L] poured over all devices [D]: nothing can be faster."""
    layers, devices = len(work), len(base)
    if not devices:
        return np.zeros(layers)
    order = np.argsort(base, kind="stable")
    width, volume = np.cumsum(speed[order]), np.cumsum((speed * base)[order])
    level: Floats = np.min((work[:, None] + volume) / width, axis=1)
    return np.where(work > 0, level, 0.0)


def active(group: Ints, groups: int, done: Floats, parts: Ints) -> Bools:
    """[M] which vessels of each group may be used: the `parts` [G] that are `done` first."""
    order = np.lexsort((done, group))
    size = np.bincount(group, minlength=groups)
    first = np.cumsum(size) - size
    rank = np.empty(len(group), dtype=np.int64)
    rank[order] = np.arange(len(group)) - first[group[order]]
    allowed: Bools = rank < parts[group]
    return allowed
