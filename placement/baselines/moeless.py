"""MoEless's scaler and placer (arXiv 2603.06350), from the paper's description. Pure.

*Scaler*, layer by layer: every expert has one replica; while loads per replica vary by more than `SPREAD` (standard
deviation over mean) and the layer has memory, the most loaded expert gets one more. *Placer*: replicas by falling load
go to a device that holds the slice already, else to the least loaded one. Rows are split evenly.
"""

from __future__ import annotations

import numpy as np

from placement.arrays import Floats, Ints
from placement.problem import Assignment, Copies, Problem, ProblemError

SPREAD = 0.2


def moeless(problem: Problem) -> Assignment:
    """Memory is cut evenly between layers; raise ProblemError where not every expert gets a replica."""
    layers, _, devices = problem.shape
    load = problem.demand.high
    count = scale(load, int(problem.slots.sum()) // max(layers, 1), np.full(load.shape, devices))
    return place(problem, count)


def scale(load: Floats, replicas: int, most: Ints) -> Ints:
    """[L, E] replicas of each expert: at most `most` [L, E] of it and `replicas` of a layer."""
    if replicas < load.shape[1]:
        raise ProblemError(f"MoEless needs a replica of each of {load.shape[1]} experts in every layer: {replicas} fit")
    count = np.ones(load.shape, dtype=np.int64)
    rows = np.arange(len(load))
    for _ in range(replicas - load.shape[1]):
        each = load / count
        total = count.sum(axis=1)
        mean = load.sum(axis=1) / total
        spread = np.sqrt((count * (each - mean[:, None]) ** 2).sum(axis=1) / total)
        hottest = np.argmax(np.where(count < most, each, -1.0), axis=1)
        more = (spread > SPREAD * mean) & (count < most)[rows, hottest]
        if not more.any():
            break
        count[rows[more], hottest[more]] += 1
    return count


def place(problem: Problem, count: Ints) -> Assignment:
    """`count` [L, E] replicas of each expert on devices; what finds no place is left out."""
    layers, experts, _ = problem.shape
    each = problem.demand.high / np.maximum(count, 1)
    free = problem.slots.copy()
    chosen = [_place(problem, layer, each[layer], count[layer], free) for layer in range(layers)]
    layer = np.concatenate([np.full(len(expert), layer) for layer, (expert, _) in enumerate(chosen)])
    expert = np.concatenate([expert for expert, _ in chosen])
    device = np.concatenate([device for _, device in chosen])
    placed = np.bincount(layer * experts + expert, minlength=layers * experts)
    return Assignment.of(problem, Copies.of(layer, expert, device, 1 / placed[layer * experts + expert]))


def _place(problem: Problem, layer: int, each: Floats, count: Ints, free: Ints) -> tuple[Ints, Ints]:
    """Expert and device of one layer's replicas; takes their slots from `free` [D]."""
    resident = problem.resident
    here = resident.layer == layer
    warm = np.zeros((len(each), len(free)), dtype=np.bool_)
    warm[resident.expert[here], resident.device[here]] = True
    held = np.zeros_like(warm)
    load = np.zeros(len(free))
    order = np.argsort(-each, kind="stable")
    experts, devices = [], []
    for expert in np.repeat(order, count[order]):
        allowed = (free > 0) & ~held[expert]
        if problem.bound:
            allowed &= problem.devices.unit == problem.unit[layer, expert]
        reuse = allowed & warm[expert]
        options = reuse if reuse.any() else allowed
        if not options.any():
            continue
        device = int(np.argmin(np.where(options, load, np.inf)))
        held[expert, device] = True
        free[device] -= 1
        load[device] += each[expert]
        experts.append(int(expert))
        devices.append(device)
    return np.array(experts, dtype=np.int64), np.array(devices, dtype=np.int64)
