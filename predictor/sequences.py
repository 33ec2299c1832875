"""The running sequences' own routing so far, and how many rows each is still good for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from predictor.lengths import RemainingLengths
from predictor.routed_rows import RoutedRows
from predictor.routing import StepRouting

_DECODE_MEMORY = 24.0  # rows after which a sequence's own decoding counts 1/e
_PROMPT_COUNTS = 6.0  # for so many decoding rows a sequence's own prompt counts
_OTHERS_COUNT = 4.0  # and all sequences' decoding
_FAR = 1024  # steps: as good as until their ends


class RunningSequences:
    """Own routing of each running sequence [cells], prompt and decoding apart.

    Sums of decoding rows grow by a rising weight instead of being scaled down, see `Affinity`.
    """

    def __init__(self, cells: int, near: int = 16) -> None:
        self._cells = cells
        self._near = near
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._sums = np.zeros((2, 0, cells), np.float32)  # decode, prompt
        self._rows = np.zeros((2, 0), np.float32)
        self._emitted = np.zeros(0, np.int64)
        self._left = np.zeros(0, np.int64)
        self.gain = 1.0
        """How much a row of the latest step counts."""
        self._numbers = np.zeros(0, np.int64)
        self._lengths = RemainingLengths()
        self._running = np.zeros(0, np.int64)
        self._prompt_left = np.zeros(0, np.int32)
        self._mean = np.zeros(cells, np.float32)  # of decoding rows, fading

    def follow(self, step: StepRouting) -> None:
        """Note who runs after `step`, and how far; its rows are learned later."""
        self.gain *= 1 / (1 - 1 / _DECODE_MEMORY)
        self._follow(step)
        self._numbers = step.running

    def learn(self, rows: RoutedRows) -> None:
        """Learn from rows of the steps that were followed since the last time; who runs no more is passed over."""
        if len(self._numbers):
            order = np.argsort(self._numbers)
            found = order[np.minimum(np.searchsorted(self._numbers, rows.sequences, sorter=order), len(order) - 1)]
            ours = self._numbers[found] == rows.sequences
            prompt = rows.prefill[ours]
            place = prompt * len(self._emitted) + self._running[found[ours]]
            gain = np.where(prompt, np.float32(1), rows.gain[ours])
            where = (place[:, None] * self._cells + rows.cells[ours]).ravel()
            np.add.at(self._sums.reshape(-1), where, np.repeat(gain, rows.cells.shape[1]))
            np.add.at(self._rows.reshape(-1), place, gain)
        if self.gain > 1e6:
            self._sums[0] /= self.gain
            self._rows[0] /= self.gain
            self.gain = 1.0

    def decoding(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Rows expected to be decoded soon and until their ends: (rows per cell [2, cells], rows [2])."""
        slots = self._running
        if not len(slots):
            return np.zeros((2, self._cells), np.float32), np.zeros(2, np.float32)
        emitted, left = self._emitted[slots], self._left[slots]
        expected = [self._lengths.expected(emitted, left, horizon) for horizon in (self._near, _FAR)]
        weight = np.stack(expected).astype(np.float32)
        weight *= self._prompt_left == 0
        own, prompt = self._rows[0, slots] / np.float32(self.gain), self._rows[1, slots]
        total = own + np.where(prompt > 0, _PROMPT_COUNTS, 0) + _OTHERS_COUNT
        by_own = weight / (total * np.float32(self.gain))
        by_prompt = weight * _PROMPT_COUNTS / (total * np.maximum(prompt, 1))
        rows = by_own @ self._sums[0, slots] + by_prompt @ self._sums[1, slots]
        others = weight @ (_OTHERS_COUNT / total).astype(np.float32)
        return (rows + others[:, None] * self._mean).astype(np.float32), weight.sum(axis=1)

    def prompts(self) -> tuple[npt.NDArray[np.float32], np.float32]:
        """Rows left of prompts that have begun: (rows per cell [cells], rows)."""
        slots = self._running[self._prompt_left > 0] if len(self._running) else self._running
        if not len(slots):
            return np.zeros(self._cells, np.float32), np.float32(0)
        left, done = self._prompt_left[self._prompt_left > 0].astype(np.float32), self._rows[1, slots]
        weight = np.where(done > 0, left / np.maximum(done, 1), 0).astype(np.float32)
        return weight @ self._sums[1, slots], np.float32(left[done > 0].sum())

    def set_mean(self, mean: npt.NDArray[np.float32]) -> None:
        """How all sequences' decoding rows were routed lately, per row [cells]."""
        self._mean = mean

    def _follow(self, step: StepRouting) -> None:
        """Slots for the running sequences; those that are gone give theirs up."""
        running = step.running.tolist()
        gone = [self._slots.pop(number) for number in self._slots.keys() - set(running)]
        new = [number for number in running if number not in self._slots]
        for number in new:
            slot = self._slots[number] = self._free.pop() if self._free else self._more()
            self._sums[:, slot] = 0
            self._rows[:, slot] = 0
            self._emitted[slot] = 0
        self._running = np.array([self._slots[number] for number in running], np.int64)
        self._prompt_left = step.prompt_left
        self._learn_lengths(step.tokens_left, np.array(gone, np.int64), {self._slots[number] for number in new})
        self._free += gone

    def _more(self) -> int:
        """Room for twice as many sequences; one of the new slots."""
        had = len(self._emitted)
        size = max(8, 2 * had)
        for name in ("_sums", "_rows"):
            old = getattr(self, name)
            new = np.zeros((2, size, *old.shape[2:]), np.float32)
            new[:, :had] = old
            setattr(self, name, new)
        self._emitted = np.concatenate([self._emitted, np.zeros(size - had, np.int64)])
        self._left = np.concatenate([self._left, np.zeros(size - had, np.int64)])
        self._free += range(had + 1, size)
        return had

    def _learn_lengths(self, left: npt.NDArray[np.int32], gone: npt.NDArray[np.int64], new: set[int]) -> None:
        slots = self._running
        if new:
            fresh = [i for i, slot in enumerate(slots.tolist()) if slot in new]
            self._left[slots[fresh]] = left[fresh]
        before = self._emitted[slots]
        emitted = self._left[slots] - left
        early = gone[self._left[gone] > 1]
        self._lengths.observe(before[emitted > 0], self._emitted[early])
        self._emitted[slots] = before + emitted
        self._left[slots] = left
