"""Emulated devices: results as late as the device would give them, one call after the other, at no cost in CPU."""

from __future__ import annotations

import threading
import time

import pytest

from experts.device import EmulatedDevice, RealDevice, make_device
from placement.policy import DevicePolicy


def test_a_call_takes_the_time_of_its_segments() -> None:
    device = EmulatedDevice(rows_per_s=1000, weight_read_s=2e-3, call_s=5e-4)
    assert device.seconds([1]) == pytest.approx(2.5e-3)
    assert device.seconds([1, 2, 10]) == pytest.approx(5e-4 + 2e-3 + 2e-3 + 1e-2)


def test_the_result_is_there_first_and_the_answer_in_time() -> None:
    device, done = EmulatedDevice(1000, 5e-3, 0.0), threading.Event()
    started, computing = time.monotonic(), time.process_time()
    busy = [device.run([1], done.set) for _ in range(20)]
    took, used = time.monotonic() - started, time.process_time() - computing
    assert done.is_set()
    assert took >= 0.1
    assert min(busy) >= 5e-3
    assert sorted(busy)[10] < 6e-3  # the machine is shared
    assert used < 0.2 * took


def test_calls_of_all_connections_wait_for_each_other() -> None:
    device, ended = EmulatedDevice(1000, 2e-2, 0.0), []
    started = time.monotonic()

    def call() -> None:
        device.run([1], lambda: None)
        ended.append(time.monotonic() - started)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, end in enumerate(sorted(ended), 1):
        assert end >= 0.02 * place


def test_what_takes_longer_here_than_there_is_not_hurried() -> None:
    device = EmulatedDevice(1000, 1e-3, 0.0)
    assert device.run([1], lambda: time.sleep(0.02)) >= 0.02


def test_a_device_is_what_the_policy_says_and_says_so() -> None:
    assert isinstance(make_device(DevicePolicy(), "cpu"), RealDevice)
    assert make_device(DevicePolicy(), "cuda:0").name == "cuda:0"
    policy = DevicePolicy(kind="emulated", rows_per_s=2000, weight_read_ms=1.5)
    assert make_device(policy, "cpu").name == "emulated (2000 rows/s, 1.5 ms)"
