"""Copies on two nodes: what is hot outlives the loss of one. Pure."""

from __future__ import annotations

import numpy as np

from placement.arrays import Bools, Ints, rank_among
from placement.problem import Problem
from placement.scaler import Scale
from placement.table import Table


def spread_out(table: Table, problem: Problem, scaled: Scale, bound: int) -> bool:
    """Move one copy of each slice that should be spread but has all its copies on one node, where another has room.

    One slice of each layer at a time, the hottest first, to the device of another node that is done first. False where
    no slice needed it.
    """
    if not scaled.spread.any():
        return False
    together, home = _on_one_node(table, problem.devices.node, scaled.spread)
    order = np.argsort(-np.where(together, scaled.work, -1.0), axis=1, kind="stable")
    for turn in range(int(together.sum(axis=1).max(initial=0))):
        layers = np.flatnonzero(together.sum(axis=1) > turn)[: max(0, bound - table.moves)]
        if not len(layers):
            break
        expert = order[layers, turn]
        _apart(table, problem, layers, expert, home[layers, expert])
    return bool(together.any())


def _on_one_node(table: Table, node: Ints, spread: Bools) -> tuple[Bools, Ints]:
    """[L, E] slices of `spread` whose two or more copies are all on one node, and that node."""
    layer, column = table.entries()
    expert = table.expert[layer, column]
    low = np.full((table.layers, table.experts), np.iinfo(np.int64).max)
    high = np.full((table.layers, table.experts), -1)
    where = node[table.device[layer, column]]
    np.minimum.at(low, (layer, expert), where)
    np.maximum.at(high, (layer, expert), where)
    return spread & (table.copies[:, :-1] > 1) & (low == high), low


def _apart(table: Table, problem: Problem, layers: Ints, expert: Ints, home: Ints) -> None:
    """Move one copy of slice `expert` in each of `layers` away from node `home`; rather one that is not loaded yet."""
    each = np.arange(len(layers))
    level = table.level(layers)
    barred = (problem.devices.node == home[:, None]) | (table.free <= 0)
    if problem.bound:
        barred |= problem.devices.unit != problem.unit[layers, expert][:, None]
    to = np.argmin(np.where(barred, np.inf, level), axis=1)
    own = table.expert[layers] == expert[:, None]
    column = np.argmax(own * (1 + table.fresh[layers]), axis=1)
    fits = ~barred[each, to]
    # layers that chose the same device: as many as it has room for
    rank = rank_among(to)
    fits &= rank < table.free[to]
    table.move(layers[fits], column[fits], to[fits])
