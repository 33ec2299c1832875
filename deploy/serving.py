"""`evermoe serve`: starts the service, says where it is and how its experts warm up, and ends it on Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.live import Live

from deploy.fit import check_policy, this_host
from deploy.launcher import check_port, running
from deploy.models import DEFAULT_MODEL, ensure_store, model_facts
from deploy.progress import preparation_bar
from deploy.status import StatusError, fetch_status, is_warm, warm_up
from placement.policy import Policy, load_policy
from recovery.directory import Directory

if TYPE_CHECKING:
    from experts.store import ExpertStore

T = TypeVar("T")

_POLL_S = 0.5


def serve_model(
    model: Path | None,
    *,
    host: str,
    port: int,
    policy_file: Path | None,
    name: str | None,
    dtype: str,
    record: Path | None,
    console: Console,
) -> None:
    """Serve until interrupted. Everything that can be wrong is checked before anything is started."""
    _interrupt_once()
    policy = load_policy(policy_file)
    check_policy(policy, policy_file, None, [this_host(gpus=policy.wants_gpu)])
    if record is not None:
        from deploy.recording import check_writable

        check_writable(record)
        record = record.resolve()
    check_port(host, port)
    redis_url = os.environ.get("REDIS_URL")
    if redis_url:
        Directory(redis_url, "probe").wait()
    source = model or DEFAULT_MODEL
    served = name or source.resolve().name
    console.print(f"starting [bold]{served}[/] ...")
    store = _in_background(lambda: _store(source, dtype, console, served, policy, policy_file))
    if model is not None:
        store()  # a model of the operator's own is judged before anything starts; ours can wait for Ray
    with running(store, policy, name=served, host=host, port=port, redis_url=redis_url, record=record):
        _interrupt_once()
        url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        console.print(
            f"listening on [bold]{url}[/]   (Ctrl-C stops)\n\ntry it:\n{_example(url, served)}\n", soft_wrap=True
        )
        try:
            _show_warm_up(url, console)
            threading.Event().wait()
        except KeyboardInterrupt:
            console.print(f"stopping ... (running requests have {policy.api.drain_s:g} s to finish)")


def _store(model: Path, dtype: str, console: Console, name: str, policy: Policy, file: Path | None) -> ExpertStore:
    with preparation_bar(console) as progress:
        store = ensure_store(model, dtype=dtype, progress=progress)
    check_policy(policy, file, model_facts(store.manifest, name), None)
    return store


def _in_background(work: Callable[[], T]) -> Callable[[], T]:
    """Start `work` in a thread; the function returned waits for its result or raises its error.

    The thread does not keep the process alive: a preparation that is interrupted goes on where it was the next time.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True, name="store").start()
    return result.result


def _interrupt_once() -> None:
    """The first SIGINT or SIGTERM interrupts whatever is going on; later ones must not cut the cleaning up short.

    To be called again once Ray has started: it puts a handler of its own before this one, which dumps a stack and ends
    the process seconds later, by an alarm.
    """

    def interrupt(number: int, frame: object) -> None:
        signal.alarm(0)
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def _example(url: str, name: str) -> str:
    body = f'{{"model": "{name}", "prompt": "def add(a, b):", "max_tokens": 32, "stream": true}}'
    return f"curl -N {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"


def _show_warm_up(url: str, console: Console) -> None:
    """One live line until every planned replica is ready; requests are answered meanwhile."""
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        while True:
            with contextlib.suppress(StatusError):
                report = fetch_status(url)
                if is_warm(report):
                    break
                live.update(f"{warm_up(report)} (the gateway runs the others' rows itself)")
            time.sleep(_POLL_S)
    console.print(warm_up(report))
