"""Keeps one gateway running: forks it from a nursery, and another one as soon as it is gone. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time

import msgspec

from gateway.nursery import Order, Report

log = logging.getLogger(__name__)

_QUICK_S = 2.0
_MOST_QUICK = 3
"""So many gateways in a row that lived less than `_QUICK_S`, or never did: what is wrong, another one does not mend."""
_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 1.0
_ENVIRONMENT = {"GOMP_SPINCOUNT": "20000"}
"""How long OpenMP's threads spin before they sleep, read when torch is imported: the cores are shared."""


class GatewayFailedError(RuntimeError):
    """The gateway does not start, or does not stay; the message begins with the reason."""


class Keeper:
    """A gateway that comes back. `limit_s` is what it gets to end by itself. An async context manager.

    Entering it returns when the first gateway is ready; raise GatewayFailedError where it never is.
    """

    def __init__(self, order: Order, *, limit_s: float) -> None:
        self._order = order
        self._limit_s = limit_s
        self._nursery: subprocess.Popen[bytes] | None = None
        self._reports: asyncio.StreamReader | None = None
        self._pipe: asyncio.BaseTransport | None = None
        self._pid = 0
        self._born = 0
        self._ending = False
        self.failure: str | None = None
        """Why there is no gateway any more, and none will be."""
        self.failed = asyncio.Event()
        """Set with it."""

    async def __aenter__(self) -> Keeper:
        try:
            await self._start()
        except BaseException:
            await self._end_nursery()
            raise
        self._keeping = asyncio.create_task(self._keep(), name="keep-gateway")
        return self

    async def __aexit__(self, *error: object) -> None:
        """End the gateway with manners, then its nursery."""
        self._ending = True
        with contextlib.suppress(ProcessLookupError):
            if self._pid:
                os.kill(self._pid, signal.SIGTERM)
        _, late = await asyncio.wait([self._keeping], timeout=self._limit_s)
        if late:
            self._keeping.cancel()
        await asyncio.gather(self._keeping, return_exceptions=True)
        await self._end_nursery()

    async def _keep(self) -> None:
        quick = 0
        while self.failure is None:
            since = time.monotonic()
            await _ended(self._pid)
            if self._ending:
                return
            quick = quick + 1 if time.monotonic() - since < _QUICK_S else 0
            log.error("the gateway (process %d) is gone: another one takes its place", self._pid)
            await asyncio.sleep(min(_PAUSE_S * quick, _LONGEST_PAUSE_S))
            try:
                await self._start()
                if self._ending:
                    os.kill(self._pid, signal.SIGTERM)
            except (GatewayFailedError, OSError) as error:
                log.error("the gateway does not start: %s", error)
                if quick >= _MOST_QUICK:
                    self.failure = str(error)
                    self.failed.set()

    async def _start(self) -> None:
        """A gateway that is ready; `_pid` is its process."""
        if self._nursery is None or self._nursery.poll() is not None:
            await self._end_nursery()
            await self._start_nursery()
        assert self._nursery is not None
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(msgspec.json.encode(self._next()) + b"\n")
        self._pid = (await self._report()).pid
        while True:
            report = await self._report()
            if report.pid != self._pid:
                continue  # a word of the one before
            if report.failed is not None:
                raise GatewayFailedError(report.failed)
            return

    def _next(self) -> Order:
        """The order, under a name of its own: nobody shall take one gateway for another."""
        self._born += 1
        if self._born == 1:
            return self._order
        return msgspec.structs.replace(self._order, name=f"{self._order.name}.{self._born}", record=None)

    async def _report(self) -> Report:
        assert self._reports is not None
        line = await self._reports.readline()
        if not line:
            raise GatewayFailedError("the process that gateways are forked from has ended")
        return msgspec.json.decode(line, type=Report)

    async def _start_nursery(self) -> None:
        ours, theirs = os.pipe()
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "gateway.nursery", str(theirs)], stdin=subprocess.PIPE, bufsize=0,
            pass_fds=[theirs], start_new_session=True, env=_ENVIRONMENT | os.environ,
        )  # fmt: skip
        os.close(theirs)
        self._reports = asyncio.StreamReader()
        loop, reader = asyncio.get_running_loop(), self._reports
        pipe = os.fdopen(ours, "rb", 0)
        self._pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)

    async def _end_nursery(self) -> None:
        if self._nursery is None:
            return
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        self._nursery.kill()
        await asyncio.to_thread(self._nursery.wait)
        if self._pipe is not None:
            self._pipe.close()
        self._nursery = self._reports = self._pipe = None


async def _ended(pid: int) -> None:
    """Return when the process, which need not be a child, has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
