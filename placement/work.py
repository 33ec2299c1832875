"""Rows as seconds, for all slices at once. Pure.

`t(rows) = max(read the weights, compute the rows)`: a slice with few rows takes what reading its weights takes, on each
device that gets a part of them (METRO, arXiv 2512.09277). So seconds can be split over devices like a liquid only into
parts that are still bound by computing: `most_parts`. Everything after this file counts seconds, not rows.
"""

from __future__ import annotations

import numpy as np

from placement.arrays import Floats, Ints
from placement.cost import Speed


def work_seconds(speed: Speed, rows: Floats) -> Floats:
    """Seconds of each slice with so many `rows` in a step; fewer than one row is a step that seldom needs it."""
    seconds: Floats = np.maximum(speed.read_s * np.minimum(rows, 1.0), speed.row_s * rows)
    return seconds


def most_parts(speed: Speed, rows: Floats, most: Ints) -> Ints:
    """Copies that share a slice's rows without reading its weights more often than computing hides; 1 to `most`."""
    if speed.read_s <= 0:
        return np.full(rows.shape, most, dtype=np.int64)
    parts: Ints = np.clip(speed.row_s * rows / speed.read_s, 1, most).astype(np.int64)
    return parts
