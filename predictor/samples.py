"""Moments of a recording with what was known at each and what came after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from predictor.features import History, Moment
from predictor.horizon import Future, Horizon, future
from predictor.load_step import LoadStep
from predictor.records import Records
from predictor.shape import ModelShape

WARM_UP = 64
"""Steps at the start of a recording from which only history is taken."""


@dataclass(frozen=True)
class Samples:
    """n moments, in order of time within each recording."""

    shape: ModelShape
    steps: npt.NDArray[np.int64]
    """[n]: the step after which the moment is"""
    ends: npt.NDArray[np.int64]
    """[n]: the last step of its horizon"""
    scalars: npt.NDArray[np.float32]
    """[n, SCALARS]"""
    shares: npt.NDArray[np.float32]
    """[n, SHARES, L, E]"""
    future: Future

    def __len__(self) -> int:
        return len(self.steps)

    def take(self, chosen: npt.NDArray[np.int64] | slice) -> Samples:
        """Some of them."""
        then = self.future.take(chosen)
        return Samples(
            self.shape, self.steps[chosen], self.ends[chosen], self.scalars[chosen], self.shares[chosen], then
        )


def sample(records: Records, horizons: Sequence[Horizon], stride: int) -> list[Samples]:
    """Every `stride`-th moment of `records` whose horizon lies within them, for each of `horizons`.

    The features are computed once, for all horizons. Moments followed by no rows at all are left out.
    """
    ends = [horizon.ends(records.time_s) for horizon in horizons]
    wanted = np.arange(min(WARM_UP, len(records) // 4), len(records), stride)
    moments = _moments(records, wanted)
    scalars = np.array([moment.scalars for moment in moments], np.float32)
    shares = np.array([moment.shares for moment in moments], np.float32)
    found = []
    for horizon, end in zip(horizons, ends, strict=True):
        whole = np.flatnonzero(end[wanted] > wanted)
        then = future(records, wanted[whole], horizon)
        samples = Samples(records.shape, wanted[whole], end[wanted[whole]], scalars[whole], shares[whole], then)
        found.append(samples.take(np.flatnonzero(then.prefill_rows + then.decode_rows > 0)))
    return found


def concatenate(parts: Sequence[Samples]) -> Samples:
    """The samples of several recordings of one model."""
    futures = [part.future for part in parts]
    return Samples(
        parts[0].shape,
        np.concatenate([part.steps for part in parts]),
        np.concatenate([part.ends for part in parts]),
        np.concatenate([part.scalars for part in parts]),
        np.concatenate([part.shares for part in parts]),
        Future(
            np.concatenate([then.counts for then in futures]),
            np.concatenate([then.prefill_rows for then in futures]),
            np.concatenate([then.decode_rows for then in futures]),
            np.concatenate([then.foreseen for then in futures]),
        ),
    )


def load_step(records: Records, index: int) -> LoadStep:
    """One step of a recording, as it was written."""
    return LoadStep(
        time_s=float(records.time_s[index]),
        prefill_rows=int(records.prefill_rows[index]),
        decode_rows=int(records.decode_rows[index]),
        running=int(records.running[index]),
        waiting=int(records.waiting[index]),
        waiting_tokens=int(records.waiting_tokens[index]),
        prompt_left=int(records.prompt_left[index]),
        token_budget=int(records.token_budget[index]),
        max_sequences=int(records.max_sequences[index]),
        prefill_counts=records.prefill_counts[index],
        decode_counts=records.decode_counts[index],
        look_ahead=records.look_ahead[index],
        signals=records.signals[index],
        signal_rows=records.signal_rows[index],
        foreseen=records.foreseen[index],
    )


def _moments(records: Records, wanted: npt.NDArray[np.int64]) -> list[Moment]:
    history = History(records.shape)
    moments = []
    chosen = set(wanted.tolist())
    for index in range(len(records)):
        history.observe(load_step(records, index))
        if index in chosen:
            moments.append(history.moment())
    return moments
