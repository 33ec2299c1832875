"""From what a routing log noted to chunks that can be sent."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from gateway.look_ahead import look_ahead
from gateway.routed import RoutedStep
from gateway.routing_chunk import RoutingChunk, StepHead
from gateway.routing_log import RoutingLog

_MOST_ROWS = 2048


class RoutingPacker:
    """Takes steps out of `log`. One thread calls it, not the engine's."""

    def __init__(self, log: RoutingLog, experts: int, token_budget: int, max_sequences: int) -> None:
        """`experts` are those of one layer; a step has `token_budget` rows and `max_sequences` sequences at most."""
        self._log = log
        self._experts = experts
        self._token_budget, self._max_sequences = token_budget, max_sequences
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
            max_sequences=self._max_sequences,
            dropped=self._dropped - before,
        )

    def _look_ahead(self, steps: list[RoutedStep]) -> npt.NDArray[np.int32]:
        """[steps, layers, experts]; asks those routers that were not asked yet."""
        if self._log.gates is not None:
            look_ahead(self._log.gates, self._log.layers, steps)
        counts = np.zeros((len(steps), len(self._log.layers), self._experts), np.int32)
        for step, routed in enumerate(steps):
            for place, before in enumerate(self._log.layers[:-1], 1):
                ahead = routed.layers[before].ahead
                if ahead is not None:
                    counts[step, place] = np.bincount(ahead.cpu().numpy().ravel(), minlength=self._experts)
        return counts


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
