"""A gateway's load, told to a process of low priority that learns from it, records it and streams it.

That process (`gateway.load_observer`) is there because the work is Python's: a thread would take its time from the
engine's. What is done here is copying, and asking routers for many rows at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import subprocess
import sys
import threading

import msgspec
import torch

from gateway.routing_chunk import Hello
from gateway.routing_packer import RoutingPacker

log = logging.getLogger(__name__)

_INTERVAL_S = 0.2
_END_S = 10.0
_AGAIN_S = 5.0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


class LoadFeed:
    """Runs the observer and keeps it fed, from a thread, until closed. The engine never waits for either.

    An observer that falls behind loses steps (`RoutingLog.dropped`); one that ends is replaced, and records no more.
    """

    def __init__(self, packer: RoutingPacker, hello: Hello) -> None:
        self._packer = packer
        self._hello = hello
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load-feed", daemon=True)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Tell what is left, and let the observer finish its record."""
        self._stop.set()
        self._thread.join(_END_S)
        if self._process is None:
            return
        if self._thread.is_alive():  # it writes to an observer that does not read
            self._process.kill()
            self._thread.join()
        _end(self._process)

    def _run(self) -> None:
        torch.set_num_threads(1)  # of this thread: the engine's cores are the engine's
        torch.get_num_threads()  # settles it: a thread takes what any has set last when it first asks
        while not self._stop.is_set():
            try:
                self._feed()
            except OSError as error:
                log.warning("the load observer is lost (%s), another one is started", error)
                if self._process is not None:
                    _end(self._process)
                self._hello = msgspec.structs.replace(self._hello, record=None)
                self._stop.wait(_AGAIN_S)

    def _feed(self) -> None:
        """Start an observer and tell it everything; raise OSError when it is gone."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gateway.load_observer"], stdin=subprocess.PIPE, bufsize=0, start_new_session=True,
            env={**os.environ, **_ENVIRONMENT},
        )  # fmt: skip
        self._tell(self._hello)
        stopping = False
        while not stopping:
            stopping = self._stop.wait(_INTERVAL_S)
            while (chunk := self._packer.pack()) is not None:
                self._tell(chunk)

    def _tell(self, message: msgspec.Struct) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        payload = msgspec.msgpack.encode(message)
        left = memoryview(struct.pack("<I", len(payload)) + payload)
        while left:
            left = left[self._process.stdin.write(left) :]


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        assert process.stdin is not None
        process.stdin.close()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
