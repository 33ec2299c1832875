"""What computes a replica's calls: this machine, or a device that is only emulated.

An emulated device returns the machine's real result, but not before the time that a device of given speeds would take,
one call after the other. Waiting takes no CPU: many replicas on few cores behave like as many devices.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from placement.policy import DevicePolicy

_PR_SET_TIMERSLACK = 29
_libc = ctypes.CDLL(None)


class Device(Protocol):
    """Runs the calls of all connections of a replica."""

    name: str
    """For people."""

    def run(self, rows: Sequence[int], work: Callable[[], None]) -> float:
        """Let `work` compute segments of so many `rows`; return the seconds the device was busy with them."""


class RealDevice:
    """This machine: calls take as long as they take."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, rows: Sequence[int], work: Callable[[], None]) -> float:
        """See `Device`."""
        started = time.perf_counter()
        work()
        return time.perf_counter() - started


class EmulatedDevice:
    """Takes `max(weight_read, rows / rows_per_s)` for each segment and `call` for each call, one call at a time."""

    def __init__(self, rows_per_s: float, weight_read_s: float, call_s: float) -> None:
        self.name = f"emulated ({rows_per_s:g} rows/s, {weight_read_s * 1000:g} ms)"
        self._row_s = 1 / rows_per_s
        self._read_s = weight_read_s
        self._call_s = call_s
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._precise = threading.local()

    def seconds(self, rows: Sequence[int]) -> float:
        """Time of a call with segments of so many `rows`."""
        return self._call_s + sum(max(self._read_s, self._row_s * count) for count in rows)

    def run(self, rows: Sequence[int], work: Callable[[], None]) -> float:
        """See `Device`. Calls are served in the order they come; meanwhile the machine computes the result."""
        with self._lock:
            begin = max(time.monotonic(), self._free_at)
            end = self._free_at = begin + self.seconds(rows)
        work()
        left = end - time.monotonic()
        if left > 0:
            self._wake_in_time()
            time.sleep(left)
        return max(end, time.monotonic()) - begin

    def _wake_in_time(self) -> None:
        """The kernel may wake a thread 50 us late, to save a little power, unless told otherwise."""
        if not hasattr(self._precise, "told"):
            _libc.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
            self._precise.told = True


def make_device(policy: DevicePolicy, real: str, number: int = 0) -> Device:
    """The device of a policy, for its unit's replica of this `number`; `real` names the machine's own."""
    if policy.kind == "real":
        return RealDevice(real)
    assert policy.rows_per_s is not None
    assert policy.weight_read_ms is not None
    faster = policy.speeds[number % len(policy.speeds)]
    return EmulatedDevice(policy.rows_per_s * faster, policy.weight_read_ms / 1000 / faster, policy.call_ms / 1000)
