"""A replay from the trace to the report: asks the server, plays, shows how far it is, and stops when told to."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deploy.texts import plain_texts
from replay.client import Client, allow_many_files, go_first
from replay.connection import Connections
from replay.outcome import Outcome, OutcomeWriter
from replay.prompts import Prompts
from replay.reading import Trace
from replay.replay_report import Played, write_report
from replay.replayer import Asking, Replayer
from replay.server import ask_models, key_header, open_session, prompts_for
from replay.slo import Slo
from replay.statistics import describe
from replay.summary import Summary, Tally
from replay.trace import TraceError, requests
from replay.transforms import Selection, answered

REQUESTS_FILE = "requests.jsonl"
_BLOCK_BYTES = 1 << 15  # of the trace at a time: while more is read, nothing can be sent
_TEXT_CHARACTERS = 1 << 17  # of each kind of text
_REFRESH_S = 0.5


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked for; see `evermoe replay --help`."""

    url: str
    selection: Selection
    model: str | None = None
    api_key: str | None = None
    slo: Slo | None = None
    longest: int | None = None
    as_text: bool = False
    ignore_eos: bool = True
    temperature: float = 1.0
    retries: int = 0
    timeout_s: float = 600.0


def play(plan: Plan, trace: Trace, out: Path, console: Console, checked: Callable[[], None]) -> tuple[Summary, Played]:
    """Replay `trace` and write everything that comes of it into the folder `out`.

    `checked` is called when the trace has been read once. Raise TraceError or ServerError where nothing can be sent.
    """
    _check_folder(out)
    planned = describe(plan.selection.of(answered(trace))).requests  # a bad trace is refused before anything is sent
    checked()
    again = Trace(trace.path, name=trace.format.name, strict=trace.problems.strict, block_bytes=_BLOCK_BYTES)
    with _bar(console) as bar:
        played, tally = uvloop.run(_play(plan, again, planned, out, bar))
    return write_report(out, played, tally), played


async def _play(plan: Plan, trace: Trace, planned: int, out: Path, bar: Progress) -> tuple[Played, Tally]:
    async with open_session(plan.api_key) as session:
        served = await ask_models(session, plan.url, plan.model)
        connections = Connections(plan.url, key_header(plan.api_key))
        client = Client(connections, plan.retries, plan.timeout_s)
        longest = min((tokens for tokens in (plan.longest, served.longest) if tokens is not None), default=None)
        seed = plan.selection.seed
        asking = Asking(served.model, longest, plan.temperature, plan.ignore_eos, seed)
        texts = plain_texts(_TEXT_CHARACTERS)
        prompts = await prompts_for(session, plan.url, client, asking, texts, as_text=plan.as_text, seed=seed)
        tally = Tally(plan.slo)
        out.mkdir(parents=True, exist_ok=True)
        with OutcomeWriter(out / REQUESTS_FILE) as writer:

            def tell(outcome: Outcome) -> None:
                tally.add(outcome)
                writer.write(outcome)

            replayer = Replayer(client, prompts, asking, tell)
            complete = await _run(replayer, plan, trace, planned, bar)
        connections.close()
    return _played(plan, trace, replayer, asking, prompts, planned, complete), tally


async def _run(replayer: Replayer, plan: Plan, trace: Trace, planned: int, bar: Progress) -> bool:
    """Play; whether it came to its end. The first Ctrl-C ends it, a second one everything."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()

    def stop() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stopped.set()
        replayer.stop()

    loop.add_signal_handler(signal.SIGINT, stop)
    showing = asyncio.create_task(_show(replayer, planned, bar))
    gc.collect()
    gc.freeze()  # what is there now need not be looked at again while requests wait to be sent
    allow_many_files()
    go_first()
    try:
        await replayer.run(requests(plan.selection.of(answered(trace))))
    finally:
        showing.cancel()
        loop.remove_signal_handler(signal.SIGINT)
        gc.unfreeze()
    return not stopped.is_set()


async def _show(replayer: Replayer, planned: int, bar: Progress) -> None:
    """Move the bar now and then; drawing it takes milliseconds, in which nothing is sent."""
    task = bar.add_task("", total=planned)
    while True:
        now = replayer.progress
        told = f"{now.under_way} under way, {now.failed} failed, {now.tokens} tokens"
        bar.update(task, completed=now.sent, description=told)
        bar.refresh()
        await asyncio.sleep(_REFRESH_S)


@contextmanager
def _bar(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("replaying"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    described = TextColumn("{task.description}")
    shown = console.is_terminal
    with Progress(*columns, described, console=console, transient=True, auto_refresh=False, disable=not shown) as bar:
        yield bar


def _played(
    plan: Plan, trace: Trace, replayer: Replayer, asking: Asking, prompts: Prompts, planned: int, complete: bool
) -> Played:
    chosen = plan.selection
    start, end = chosen.window
    options = {
        "window": None if chosen.window == (0.0, None) else f"{start:g}..{'' if end is None else f'{end:g}'} s",
        "scale": chosen.scale if chosen.scale != 1 else None,
        "speed": chosen.speed if chosen.speed != 1 else None,
        "limit": chosen.limit,
        "seed": chosen.seed,
        "longest": asking.longest,
        "retries": plan.retries or None,
    }
    units = prompts.units_per_token
    return Played(
        trace=str(trace.path), url=plan.url, model=asking.model, options=options, planned=planned, complete=complete,
        prompts="token ids" if units is None else f"text, {sum(units.values()) / len(units):.2f} characters a token",
        shortened=replayer.progress.shortened,
    )  # fmt: skip


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise TraceError(f"--out {out} is a file: give a folder")
    if (out / REQUESTS_FILE).exists():
        raise TraceError(f"--out {out} has a replay already: give another folder")
