"""`evermoe replay`: a thin command around the replayer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from deploy.trace_commands import (
    Format,
    Limit,
    Scale,
    Seed,
    Speed,
    Strict,
    TraceFile,
    Window,
    print_problems,
    selection,
)

if TYPE_CHECKING:
    from replay.replay_report import Played
    from replay.summary import Summary

_out = Console()
_INTERRUPTED = 130


def replay(
    trace: TraceFile,
    url: Annotated[str, typer.Option(help="The server: http://HOST:PORT")],
    out: Annotated[Path, typer.Option(help="Folder for what comes of it; made where it is not there.")],
    model: Annotated[str | None, typer.Option(help="The model to ask. Default: the server's first.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", show_envvar=True, help="The server's API key.")
    ] = None,
    slo: Annotated[str | None, typer.Option(help="What counts as good: ttft=500ms,tpot=50ms,e2e=10s")] = None,
    form: Format = None,
    strict: Strict = False,
    window: Window = None,
    scale: Scale = 1.0,
    speed: Speed = 1.0,
    limit: Limit = None,
    seed: Seed = 0,
    longest: Annotated[
        int | None, typer.Option(help="Tokens of a request at most. Default: the context that the server tells.", min=2)
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Send text even where the server takes token ids.")] = False,
    ignore_eos: Annotated[bool, typer.Option(help="Ask for answers of the trace's length (ignore_eos).")] = True,
    temperature: Annotated[float, typer.Option(help="Of sampling.", min=0.0)] = 1.0,
    retries: Annotated[int, typer.Option(help="How often a request that was refused is sent again.", min=0)] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds a request may take.", min=0.1)] = 600.0,
) -> None:
    """Play a trace to an OpenAI-compatible server, each request at its time, and report what came of it."""
    from deploy.replaying import Plan, play
    from replay.reading import Trace
    from replay.server import base_url
    from replay.slo import parse_slo

    plan = Plan(
        url=base_url(url), model=model, api_key=api_key, slo=parse_slo(slo) if slo is not None else None,
        selection=selection(window, scale, speed, limit, seed), longest=longest, as_text=text, ignore_eos=ignore_eos,
        temperature=temperature, retries=retries, timeout_s=timeout,
    )  # fmt: skip
    source = Trace(trace, name=form, strict=strict)
    summary, played = play(plan, source, out, _out, lambda: print_problems(source.problems))
    _print_summary(summary, played)
    _out.print(f"{out / 'report.html'}: all of it on one page", highlight=False, soft_wrap=True)
    if not played.complete:
        raise typer.Exit(_INTERRUPTED)


def _print_summary(summary: Summary, played: Played) -> None:
    from replay.replay_report import COLUMNS, latency_rows, notices
    from replay.spans import tell_duration

    _out.print(
        f"[bold]{played.model}[/]: {summary.sent} requests sent in {tell_duration(summary.span_s)}, {summary.failed} "
        f"failed, {summary.requests_per_s:.3g} answered/s, {summary.answer_tokens_per_s:.4g} answer tokens/s",
        highlight=False,
        soft_wrap=True,
    )
    if summary.goodput is not None:
        promised = ", ".join(f"{name} {tell_duration(bound)}" for name, bound in summary.slo.items() if bound)
        _out.print(
            f"goodput: {summary.goodput:.3g} requests/s, {summary.good_part:.1%} of those sent (within {promised})",
            highlight=False,
            soft_wrap=True,
        )
    table = Table("", *COLUMNS)
    for row in latency_rows(summary):
        table.add_row(*row)
    _out.print(table)
    for kind, count in summary.errors.items():
        _out.print(f"[red]{count} x {kind}[/]", highlight=False, soft_wrap=True)
    for sentence in (*summary.examples, *notices(played, summary)):
        _out.print(f"  {sentence}", highlight=False, markup=False, soft_wrap=True)
