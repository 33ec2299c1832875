"""Two copies change places: what is left where memory is full and nothing is spare. Pure."""

from __future__ import annotations

import numpy as np

from placement.arrays import Bools, Ints, first_of_each
from placement.problem import Problem
from placement.scaler import Scale
from placement.table import Table


def swap(
    table: Table,
    problem: Problem,
    scaled: Scale,
    where: tuple[Ints, Ints, Ints, Ints],
    *,
    worth: float,
    most: int,
) -> Bools:
    """Let one copy of each busy device change places with a smaller one anywhere; [R] where that helped by `worth`.

    `where` are layer and device [R] (each layer once), and row and column of the copies on them [M]. At `most` so many.
    """
    layers, devices, row, column = where
    layer, source = layers[row], devices[row]
    part, expert = table.part[layer, column], table.expert[layer, column]
    level = np.pad(table.level(layers), ((0, 0), (0, 1)), constant_values=np.inf)
    speed = np.append(table.speed, 1.0)
    theirs = table.device[layer]
    less = part[:, None] - table.part[layer]
    high = level[row, source]
    after = np.maximum(
        high[:, None] - less / speed[source][:, None], level[row[:, None], theirs] + less / speed[theirs]
    )
    likely, partner = np.nonzero(after < high[:, None] * (1 - worth))
    after = after[likely, partner]
    clear = _clear(table, problem, scaled, layer[likely], expert[likely], source[likely], partner)
    likely, partner, after = likely[clear], partner[clear], after[clear]
    order = np.lexsort((partner, likely, after, row[likely]))
    first = order[first_of_each(row[likely][order])][:most]
    likely, partner = likely[first], partner[first]
    chosen, mine = layer[likely], column[likely]
    to, back = table.device[chosen, partner], source[likely]
    table.move(chosen, mine, to)
    table.move(chosen, partner, back)
    helped = np.zeros(len(layers), dtype=np.bool_)
    helped[row[likely]] = True
    return helped


def _clear(
    table: Table, problem: Problem, scaled: Scale, layer: Ints, expert: Ints, source: Ints, partner: Ints
) -> Bools:
    """[P] pairs that may change places: neither device has the other's slice, no unit and no spread is in the way."""
    other, theirs = table.expert[layer, partner], table.device[layer, partner]
    clear: Bools = ~table.held[layer, expert, theirs] & ~table.held[layer, other, source]
    node, unit = problem.devices.node, problem.devices.unit
    either = scaled.spread[layer, expert] | scaled.spread[layer, other]
    clear &= ~either | (node[source] == node[theirs])
    if problem.bound:
        clear &= unit[source] == unit[theirs]
    return clear
