"""Copies of each slice as other methods count them, with the memory that our planning has. Pure."""

from __future__ import annotations

import numpy as np

from placement.arrays import Ints
from placement.baselines import moeless
from placement.baselines.eplb import eplb_hierarchical, replicate
from placement.cost import Speed
from placement.problem import Demand, Devices, Problem, ProblemError, copy_counts
from placement.settings import Method


def baseline_counts(method: Method, demand: Demand, slots: int, most: Ints, nodes: int) -> Ints:
    """[L, E] copies, at most `most` [L, E] of each and `slots` in every layer; raise ProblemError for too few slots."""
    experts = demand.high.shape[1]
    if slots < experts:
        raise ProblemError(
            f"{method} needs a copy of each of {experts} experts in every layer: the memory is for {slots}"
        )
    if method == "moeless":
        return moeless.scale(demand.high, slots, most)
    if method == "eplb":
        return np.minimum(replicate(demand.high, slots), most)
    return np.minimum(_by_node(demand, slots, nodes), most)


def _by_node(demand: Demand, slots: int, nodes: int) -> Ints:
    """Each expert stays on one node, which replicates what is its own."""
    layers, experts = demand.high.shape
    each = slots // max(nodes, 1)
    if experts % nodes or each * nodes < experts:
        return replicate(demand.high, slots)
    devices = Devices.of(np.full(nodes * each, layers), node=np.arange(nodes * each) // each)
    problem = Problem.of(demand, devices, slice_bytes=1, speed=Speed(read_s=0.0, row_s=1.0))
    return copy_counts(eplb_hierarchical(problem, experts).copies, layers, experts)
