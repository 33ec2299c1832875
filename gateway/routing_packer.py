"""From what a routing log noted to chunks that can be sent."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from gateway.look_ahead import Gates
from gateway.routing_chunk import RoutingChunk, StepHead
from gateway.routing_log import RoutedLayer, RoutedStep, RoutingLog

_MOST_ROWS = 2048


class RoutingPacker:
    """Takes steps out of `log`. One thread calls it, not the engine's."""

    def __init__(self, log: RoutingLog, experts: int, token_budget: int) -> None:
        """`experts` are those of one layer, `token_budget` the rows of a step at most."""
        self._log = log
        self._experts = experts
        self._token_budget = token_budget
        self._queued: dict[int, bytes] = {}
        self._dropped = 0

    def pack(self) -> RoutingChunk | None:
        """The oldest steps that wait; None where none do."""
        steps = self._log.take(_MOST_ROWS)
        if not steps:
            return None
        before, self._dropped = self._dropped, self._log.dropped
        self._queued = _tokens(steps, self._queued)
        chosen = torch.cat([step.layers[layer].chosen for layer in self._log.layers for step in steps])
        return RoutingChunk(
            steps=[_head(step) for step in steps],
            token_ids=torch.cat([step.token_ids for step in steps]).cpu().numpy().astype(np.int32).tobytes(),
            experts=chosen.to(torch.int16).cpu().numpy().tobytes(),
            look_ahead=self._look_ahead(steps).tobytes(),
            queued=self._queued,
            token_budget=self._token_budget,
            dropped=self._dropped - before,
        )

    def _look_ahead(self, steps: list[RoutedStep]) -> npt.NDArray[np.int32]:
        """[steps, layers, experts]"""
        counts = np.zeros((len(steps), len(self._log.layers), self._experts), np.int32)
        gates = self._log.gates
        if gates is None:
            return counts
        for place, (before, layer) in enumerate(pairwise(self._log.layers), 1):
            if _trusted(gates, layer, [step.layers[layer] for step in steps]):
                counts[:, place] = self._choices(gates, layer, [step.layers[before] for step in steps])
        return counts

    def _choices(self, gates: Gates, layer: int, before: list[RoutedLayer]) -> npt.NDArray[np.int64]:
        """[steps, experts]: what the router of `layer` chooses from the inputs of the layer `before` it.

        It is asked once for all steps: that takes about as long for one row as for a hundred.
        """
        counts = np.zeros((len(before), self._experts), np.int64)
        kept = [(step, noted.rows) for step, noted in enumerate(before) if noted.rows is not None]
        chosen = gates.choose(layer, torch.cat([rows for _, rows in kept])) if kept else None
        if chosen is not None:
            step_of = np.repeat([step for step, _ in kept], [len(rows) for _, rows in kept])
            cells = (step_of[:, None] * self._experts + chosen.cpu().numpy()).ravel()
            counts += np.bincount(cells, minlength=counts.size).reshape(counts.shape)
        for step, noted in enumerate(before):
            if noted.ahead is not None:
                counts[step] += np.bincount(noted.ahead.cpu().numpy().ravel(), minlength=self._experts)
        return counts


def _trusted(gates: Gates, layer: int, steps: list[RoutedLayer]) -> bool:
    if gates.settled(layer):
        return gates.works(layer)
    kept = [(noted.rows, noted.chosen) for noted in steps if noted.rows is not None]
    if not kept:
        return False
    return gates.trust(layer, torch.cat([rows for rows, _ in kept]), torch.cat([chosen for _, chosen in kept]))


def _tokens(steps: list[RoutedStep], known: dict[int, bytes]) -> dict[int, bytes]:
    """The tokens of all sequences in the steps' queues; those that are `known` are not converted again."""
    longest = {sequence.rank[1]: (sequence, end) for step in steps for sequence, _, end in step.queue}
    return {
        number: found
        if (found := known.get(number)) is not None and len(found) >= 4 * end
        else np.array(sequence.tokens[:end], np.int32).tobytes()
        for number, (sequence, end) in longest.items()
    }


def _head(step: RoutedStep) -> StepHead:
    queue = [(sequence.rank[1], start, end) for sequence, start, end in step.queue]
    return StepHead(step.time_s, step.works, step.running, queue, step.waiting, step.waiting_tokens)
