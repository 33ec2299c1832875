"""Which slices a replica holds: what the plan wants of it, loaded and released in the background."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from experts.errors import StoreError
from experts.ffn import ExpertFFN
from placement.plan import Plan

log = logging.getLogger(__name__)

Slice = tuple[int, int]
"""(layer, expert)"""

GRACE_S = 1.0
"""A slice that is no longer wanted stays so long: gateways may not have heard of it yet."""
_TIGHT_GRACE_S = 0.1
"""The same where its memory is needed for another one."""
_TELL_S = 0.01
"""While many slices are loaded, those that are there are announced so often."""
_PRIORITY = 10


def wanted(plan: Plan | None, replica: str, unit: Sequence[Slice]) -> list[Slice]:
    """What a replica of a `unit` should hold, the largest share first: all of it where the plan does not say."""
    if plan is None or plan.copies is None:
        return list(unit)
    copies = sorted(plan.copies.get(replica, []), key=lambda copy: -copy.share)
    named = dict.fromkeys((copy.layer, copy.expert) for copy in copies)
    return [slice_ for slice_ in named if slice_ in set(unit)]


class Residency:
    """Keeps the slices of `ffn` those that are wanted; a thread of low priority, so that no call waits for it.

    `announce(slices)` is called with those that are ready, before others are released. A slice that a call loaded
    because it was missing goes like one that is no longer wanted.
    """

    def __init__(
        self,
        ffn: ExpertFFN,
        slice_bytes: int,
        memory_bytes: int,
        announce: Callable[[list[Slice]], None],
        grace_s: float = GRACE_S,
    ) -> None:
        """`memory_bytes` is what all slices may take, of `slice_bytes` each; 0: no bound."""
        self.slices: list[Slice] = []
        """Ready and wanted."""
        self._ffn = ffn
        self._room = memory_bytes // slice_bytes if memory_bytes else None
        self._announce = announce
        self._grace_s = grace_s
        self._wanted: list[Slice] = []
        self._unwanted: dict[Slice, float] = {}
        """Slice -> since when."""
        self._changed = threading.Condition()
        self._following = False
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="residency", daemon=True)

    def want(self, slices: Iterable[Slice]) -> None:
        """Hold these from now on, the first ones first where there is no room for all. Any thread."""
        goal = list(slices)
        if self._room is not None and len(goal) > self._room:
            log.warning("%d slices are wanted here, there is memory for %d", len(goal), self._room)
            goal = goal[: self._room]
        with self._changed:
            self._wanted = goal
            self._following = True
            self._changed.notify()

    def __enter__(self) -> Residency:
        """What is wanted already is loaded when this returns."""
        self._following = False
        self._round()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        os.nice(_PRIORITY)  # on Linux it is the thread's own
        while self._wait():
            self._round()

    def _wait(self) -> bool:
        """Until something else is wanted, or a slice may be due; whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._following or self._stopped, self._grace_s / 4)
            self._following = False
            return not self._stopped

    def _round(self) -> None:
        goal = self._wanted
        self._note_unwanted(set(goal))
        self._tell(goal)
        missing = self._load(goal)
        self._release(_TIGHT_GRACE_S if missing else self._grace_s)
        if missing:
            with self._changed:
                self._changed.wait_for(lambda: self._following or self._stopped, _TIGHT_GRACE_S / 4)
                self._following = True

    def _note_unwanted(self, goal: set[Slice]) -> None:
        now = time.monotonic()
        self._unwanted = {slice_: self._unwanted.get(slice_, now) for slice_ in self._ffn.loaded - goal}

    def _load(self, goal: list[Slice]) -> bool:
        """Load what is missing of `goal`; whether something of it must wait for memory."""
        told = time.monotonic()
        for layer, expert in goal:
            held = self._ffn.loaded
            if (layer, expert) in held:
                continue
            if self._room is not None and len(held) >= self._room:
                self._tell(goal)
                return True
            try:
                self._ffn.load(layer, expert)
            except (StoreError, LookupError) as error:
                log.error("a slice can't be made resident: %s", error)
            if self._following or self._stopped:
                break
            if time.monotonic() - told > _TELL_S:
                self._tell(goal)
                told = time.monotonic()
        self._tell(goal)
        return False

    def _tell(self, goal: list[Slice]) -> None:
        ready = sorted(self._ffn.loaded.intersection(goal))
        if ready != self.slices:
            self.slices = ready
            self._announce(ready)

    def _release(self, grace_s: float) -> None:
        now = time.monotonic()
        due = [slice_ for slice_, since in self._unwanted.items() if now - since >= grace_s]
        if due:
            self._ffn.unload(due)
