"""The process gateways are forked from: everything is imported, nothing is begun. A lost gateway is replaced by a fork.

python -m gateway.nursery REPORTS       orders on standard input, reports to the file descriptor REPORTS; it ends, and
                                        every gateway with it, when its orders end
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
import traceback
from pathlib import Path

import msgspec

from placement.policy import parse_policy
from recovery.directory import Directory

log = logging.getLogger(__name__)

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_LOOK_S = 0.2
_HEAD, _TAIL = 500, 1000
"""Characters of a failure that are told."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """A gateway that is wanted."""

    store: str
    policy: str
    """As JSON."""
    redis_url: str
    namespace: str
    name: str
    """Its id in the directory."""
    node: str
    node_ip: str
    compiled: str | None
    record: str | None


class Report(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of an order: a process, which is then ready, or has failed."""

    pid: int
    ready: bool = False
    failed: str | None = None
    """Why; its first line is for people."""


def main() -> None:
    """Import, then fork a gateway for each order."""
    reports = int(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever gave the order watches the process
    import gateway.gateway  # noqa: F401 - for its children

    gc.freeze()  # their collections leave these pages shared
    for line in sys.stdin.buffer:
        pid = os.fork()
        if pid == 0:
            _become(msgspec.json.decode(line, type=Order), reports)
        _report(reports, Report(pid=pid))


def _become(order: Order, reports: int) -> None:
    """The forked process; does not return."""
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        asyncio.run(_serve(order, reports))
        code = 0
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        _report(reports, Report(pid=os.getpid(), failed=f"{error or type(error).__name__}\n{trace}"))
    finally:
        sys.stderr.flush()
        os._exit(code)  # what the parent's interpreter would do at its end is not this one's


async def _serve(order: Order, reports: int) -> None:
    """Until SIGTERM, or until the engine is beyond repair."""
    from gateway.gateway import Gateway

    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    gateway = Gateway(
        Path(order.store),
        parse_policy(msgspec.json.decode(order.policy), "the policy"),
        Directory(order.redis_url, order.namespace),
        name=order.name,
        node=order.node,
        node_ip=order.node_ip,
        compiled=None if order.compiled is None else Path(order.compiled),
        record=None if order.record is None else Path(order.record),
    )
    async with gateway:
        _report(reports, Report(pid=os.getpid(), ready=True))
        while gateway.healthy and not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _LOOK_S)
        if not gateway.healthy:
            log.error("the engine's thread has ended: this gateway is replaced")


def _report(reports: int, report: Report) -> None:
    """One line, short enough for a pipe to take it whole."""
    if report.failed is not None and len(report.failed) > _HEAD + _TAIL:
        report = msgspec.structs.replace(report, failed=f"{report.failed[:_HEAD]} ... {report.failed[-_TAIL:]}")
    os.write(reports, msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    main()
