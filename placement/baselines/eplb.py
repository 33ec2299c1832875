"""EPLB, DeepSeek's expert-parallel load balancer, implemented from its published description. Pure.

Every layer gets the same slots on every device. *Global*: each spare slot goes to the expert with the highest load per
replica; then replicas, by falling load, go to the least loaded device that has a slot left. *Hierarchical*: groups of
experts are packed on nodes first, then each node replicates and packs what is its own. What is resident is not looked
at; replicas share an expert's rows evenly.
"""

from __future__ import annotations

import numpy as np

from placement.arrays import Floats, Ints
from placement.problem import Assignment, Copies, Problem, ProblemError


def eplb_global(problem: Problem) -> Assignment:
    """All devices alike, wherever they are; raise ProblemError where not every expert gets a slot."""
    _, experts, devices = problem.shape
    slots = _slots(problem, experts, devices)
    expert, device = _balance(problem.demand.high, devices, slots)
    return _assignment(problem, expert, device)


def eplb_hierarchical(problem: Problem, groups: int) -> Assignment:
    """Groups of experts stay on one node; as published, the global way where groups don't divide by the nodes.

    Devices count as sorted by node; raise ProblemError where nodes are of different sizes.
    """
    layers, experts, devices = problem.shape
    nodes, sizes = np.unique(problem.devices.node, return_counts=True)
    if groups % len(nodes) or experts % groups:
        return eplb_global(problem)
    if len(set(sizes.tolist())) != 1:
        raise ProblemError(f"hierarchical EPLB needs nodes of one size, not {sizes.tolist()} devices")
    slots = _slots(problem, experts, devices)
    order = np.argsort(problem.devices.node, kind="stable")
    rows = problem.demand.high
    size, each = experts // groups, len(nodes)
    by_group = rows.reshape(layers, groups, size).sum(axis=2)
    node = pack(by_group, each, groups // each)
    # [L, nodes, experts of a node]: groups in the order of their nodes
    members = np.argsort(node, axis=1, kind="stable").reshape(layers, each, groups // each)
    local = (members[..., None] * size + np.arange(size)).reshape(layers * each, -1)
    loads = np.take_along_axis(rows.repeat(each, axis=0), local, axis=1)
    expert, device = _balance(loads, devices // each, slots)
    expert = np.take_along_axis(local, expert, axis=1).reshape(layers, -1)
    device = device.reshape(layers, each, -1) + (np.arange(each) * (devices // each))[:, None]
    return _assignment(problem, expert, order[device.reshape(layers, -1)])


def replicate(load: Floats, replicas: int) -> Ints:
    """[X, experts] how many of `replicas` each expert gets: one each, the rest by the highest load per replica."""
    count = np.ones(load.shape, dtype=np.int64)
    rows = np.arange(len(load))
    per_replica = load.copy()
    for _ in range(replicas - load.shape[1]):
        hottest = np.argmax(per_replica, axis=1)
        count[rows, hottest] += 1
        per_replica[rows, hottest] = load[rows, hottest] / count[rows, hottest]
    return count


def pack(weight: Floats, packs: int, places: int) -> Ints:
    """[X, items] the pack of each item: by falling weight to the lightest of `packs` with one of its `places` left."""
    rows = np.arange(len(weight))
    order = np.argsort(-weight, axis=1, kind="stable")
    chosen = np.zeros(weight.shape, dtype=np.int64)
    heavy, filled = np.zeros((len(weight), packs)), np.zeros((len(weight), packs), dtype=np.int64)
    for item in order.T:
        lightest = np.argmin(heavy, axis=1)
        chosen[rows, item] = lightest
        filled[rows, lightest] += 1
        heavy[rows, lightest] += weight[rows, item]
        full = filled[rows, lightest] == places
        heavy[rows[full], lightest[full]] = np.inf
    return chosen


def _slots(problem: Problem, experts: int, devices: int) -> int:
    """Slots of each device in each layer: as many as the smallest device has."""
    slots = int(problem.slots.min(initial=1 << 62)) // max(1, problem.shape[0]) if devices else 0
    if slots * devices < experts:
        raise ProblemError(
            f"EPLB needs a slot for each of {experts} experts in every layer: there are {slots * devices}"
        )
    return slots


def _balance(load: Floats, devices: int, slots: int) -> tuple[Ints, Ints]:
    """[X, replicas] the expert and the device of each replica."""
    count = replicate(load, devices * slots)
    expert = np.repeat(np.tile(np.arange(load.shape[1]), len(load)), count.reshape(-1)).reshape(len(load), -1)
    return expert, pack(np.take_along_axis(load / count, expert, axis=1), devices, slots)


def _assignment(problem: Problem, expert: Ints, device: Ints) -> Assignment:
    """The assignment of [L, replicas] experts and devices; replicas that met on one device are one copy."""
    layers, experts, devices = problem.shape
    layer = np.arange(layers)[:, None].repeat(expert.shape[1], axis=1)
    keys, times = np.unique((layer * experts + expert) * devices + device, return_counts=True)
    slices = keys // devices
    replicas = np.bincount(slices, weights=times, minlength=layers * experts)
    copies = Copies.of(slices // experts, slices % experts, keys % devices, times / replicas[slices])
    return Assignment.of(problem, copies)
