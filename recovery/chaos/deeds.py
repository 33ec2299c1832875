"""What is done to processes. Everything that lasts is undone at its end, even where the scenario is cut short."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from experts.wire import sockets
from recovery.chaos.scenario import EventPlan, ScenarioError
from recovery.chaos.service import Target

_PERIOD_S = 0.05
"""Of a slowed process: it is stopped for part of each."""
_GARBAGE = 4096
_CONNECT_S = 1.0


def check_device(event: EventPlan) -> None:
    """Raise ScenarioError where the event's network device can't be taken down."""
    if event.device is None:
        return
    if not Path(f"/sys/class/net/{event.device}").exists():
        known = ", ".join(sorted(os.listdir("/sys/class/net")))
        raise ScenarioError(f"there is no network device {event.device!r} here: this host has {known}")
    if event.device == "lo":
        raise ScenarioError("the loopback device is not between anybody: name one that links two hosts")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise ScenarioError("taking a network device down needs root and the `ip` command")


@contextlib.contextmanager
def done(event: EventPlan, targets: list[Target], seed: float) -> Iterator[None]:
    """The deed is done inside the context, and undone behind it as far as it can be."""
    match event.do:
        case "kill":
            _signal(targets, signal.SIGKILL)
            yield
        case "stop":
            _signal(targets, signal.SIGSTOP)
            try:
                yield
            finally:
                _signal(targets, signal.SIGCONT)
        case "slow":
            with _slowed(targets, event.factor):
                yield
        case "corrupt":
            _send_garbage(targets, random.Random(seed))
            yield
        case "partition":
            _link(str(event.device), "down")
            try:
                yield
            finally:
                _link(str(event.device), "up")


@contextlib.contextmanager
def _slowed(targets: list[Target], factor: float) -> Iterator[None]:
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            _signal(targets, signal.SIGSTOP)
            over.wait(_PERIOD_S * (1 - 1 / factor))
            _signal(targets, signal.SIGCONT)
            over.wait(_PERIOD_S / factor)

    thread = threading.Thread(target=work, name="slow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _signal(targets, signal.SIGCONT)


def _send_garbage(targets: list[Target], draw: random.Random) -> None:
    for target in targets:
        for address in target.addresses:
            with contextlib.suppress(OSError), sockets.connect(address, _CONNECT_S) as sock:
                sock.sendall(draw.randbytes(draw.randint(1, _GARBAGE)))


def _signal(targets: list[Target], number: signal.Signals) -> None:
    for target in targets:
        with contextlib.suppress(ProcessLookupError):
            os.kill(target.pid, number)


def _link(device: str, state: str) -> None:
    subprocess.run(["ip", "link", "set", device, state], check=True, capture_output=True)
