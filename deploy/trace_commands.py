"""`evermoe trace info`, `make` and `convert`: thin commands around the traces of `replay`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from replay.reading import Problems
    from replay.statistics import TraceStatistics
    from replay.trace import Chunk
    from replay.transforms import Selection

app = typer.Typer(name="trace", help="Traces of requests: look at them, make them, convert them.", no_args_is_help=True)
_out = Console()
_err = Console(stderr=True)

TraceFile = Annotated[Path, typer.Argument(help="Azure LLM 2023 or 2024, BurstGPT, Mooncake, our JSON lines; or .gz.")]
Format = Annotated[str | None, typer.Option("--format", help="The trace's format. Default: recognised by its content.")]
Strict = Annotated[bool, typer.Option(help="Refuse a trace with a malformed row, instead of counting it.")]
Window = Annotated[str | None, typer.Option(help="START..END since the trace began: 1h..2h, ..10m, 90..")]
Speed = Annotated[float, typer.Option(help="How many times as fast the trace's clock runs.")]
Scale = Annotated[float, typer.Option(help="How many times as many requests arrive, at the same pace of time.")]
Limit = Annotated[int | None, typer.Option(help="Requests at most.", min=1)]
Seed = Annotated[int, typer.Option(help="The same seed gives the same requests.", min=0)]


def selection(window: str | None, scale: float, speed: float, limit: int | None, seed: int) -> Selection:
    """What the options ask for; raise TraceError for options that are none."""
    from replay.spans import parse_window
    from replay.transforms import Selection

    span = parse_window(window) if window is not None else (0.0, None)
    return Selection(window=span, scale=scale, speed=speed, limit=limit, seed=seed)


def print_problems(problems: Problems) -> None:
    """Say on stderr what was left out, and why."""
    for note in problems.notes:
        _err.print(f"note: {note}", highlight=False, soft_wrap=True)
    if problems.count:
        _err.print(
            f"{problems.count} of {problems.rows} rows left out; the first of them:", highlight=False, soft_wrap=True
        )
    for sentence in problems.named:
        _err.print(f"  {sentence}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def info(
    trace: TraceFile,
    form: Format = None,
    strict: Strict = False,
    window: Window = None,
    scale: Scale = 1.0,
    speed: Speed = 1.0,
    limit: Limit = None,
    seed: Seed = 0,
    plot: Annotated[Path | None, typer.Option(help="PNG to write. Default: none.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a trace is like: rows, span, rate, lengths, burstiness."""
    from replay.reading import Trace
    from replay.statistics import describe
    from replay.trace_plot import draw

    chosen = selection(window, scale, speed, limit, seed)
    source = Trace(trace, name=form, strict=strict)
    if plot is not None:
        _check_writable(plot)
    statistics = describe(chosen.of(source))
    print_problems(source.problems)
    if as_json:
        sys.stdout.write(json.dumps({"format": source.format.name, **statistics.as_json()}, indent=2) + "\n")
    else:
        _print_statistics(f"{trace} ({source.format.name})", statistics)
    if plot is not None:
        draw(statistics, trace.name, plot)
        if not as_json:
            _out.print(f"rate and lengths: {plot}", soft_wrap=True)


@app.command()
def convert(
    trace: TraceFile,
    out: Annotated[Path, typer.Argument(help="File to write (JSON lines).")],
    form: Format = None,
    strict: Strict = False,
    sort: Annotated[bool, typer.Option("--sort", help="Put rows in order of time, all in memory.")] = False,
    window: Window = None,
    scale: Scale = 1.0,
    speed: Speed = 1.0,
    limit: Limit = None,
    seed: Seed = 0,
) -> None:
    """Write a trace, or a part of it, in our own format."""
    from replay.reading import Trace
    from replay.transforms import in_order

    chosen = selection(window, scale, speed, limit, seed)
    source = Trace(trace, name=form, strict=strict, in_order=not sort)
    rows = _write(chosen.of(in_order(source) if sort else source), out)
    print_problems(source.problems)
    _out.print(f"{out}: {rows} requests", highlight=False, soft_wrap=True)


@app.command()
def make(
    out: Annotated[Path, typer.Argument(help="File to write (JSON lines).")],
    shape: Annotated[
        str, typer.Option(help="day, bursty, drifting, joined by commas; or steady, which is none of them.")
    ] = "day,bursty,drifting",
    hours: Annotated[float, typer.Option(help="How long the trace is.")] = 24.0,
    rate: Annotated[float, typer.Option(help="Requests a second on average, over whole days.")] = 1.0,
    prompt_tokens: Annotated[float, typer.Option(help="Mean length of prompts.")] = 1000.0,
    answer_tokens: Annotated[float, typer.Option(help="Mean length of answers.")] = 200.0,
    longest: Annotated[int, typer.Option(help="Tokens of a request at most, prompt and answer together.")] = 8192,
    starts_at: Annotated[float, typer.Option(help="The hour of the day at which the trace begins.")] = 0.0,
    seed: Seed = 0,
) -> None:
    """Make up a trace: day-shaped, bursty, drifting."""
    from replay.making import Making
    from replay.making import make as made

    shapes = () if shape.strip() == "steady" else tuple(part.strip() for part in shape.split(","))
    making = Making(
        shapes=shapes, hours=hours, requests_per_s=rate, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens,
        longest=longest, starts_at_h=starts_at, seed=seed,
    )  # fmt: skip
    rows = _write(made(making), out)
    _out.print(f"{out}: {rows} requests in {hours:g} hours", highlight=False, soft_wrap=True)


def _check_writable(file: Path) -> None:
    from replay.trace import TraceError

    folder = file.resolve().parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise TraceError(f"{file} can't be written: give a file in a folder that exists and may be written to")


def _write(chunks: Iterable[Chunk], out: Path) -> int:
    """Write a trace; it appears complete or not at all."""
    from replay.formats import jsonl

    _check_writable(out)
    aside = out.with_name(out.name + ".partial")
    try:
        with aside.open("wb") as file:
            rows = jsonl.write(chunks, file)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    return rows


def _print_statistics(title: str, found: TraceStatistics) -> None:
    from replay.spans import tell_duration

    failed = f", {found.failed} of them without an answer (failed when recorded)" if found.failed else ""
    lines = [
        f"[bold]{title}[/]: {found.requests} requests in {tell_duration(found.span_s)}{failed}",
        f"rate: {found.rate:.3g} requests/s, {found.peak_rate:.3g} in the busiest {tell_duration(60 * found.bin_s)}; "
        f"{found.rate * found.prompt_tokens.mean:.0f} prompt and "
        f"{found.rate * (1 - found.failed / found.requests) * found.answer_tokens.mean:.0f} answer tokens/s",
        f"burstiness: gaps vary by {found.gap_variation:.2f} of their mean (coefficient of variation); "
        + "; ".join(
            f"requests in {tell_duration(float(size))} have {value:.2f} times the variance of independent arrivals"
            for size, value in found.dispersion.items()
        ),
    ]
    if found.shared_blocks is not None:
        lines.append(f"prefixes: {found.shared_blocks:.0%} of prompt blocks came before")
    for line in lines:
        _out.print(line.rstrip("; "), highlight=False, soft_wrap=True)
    table = Table("tokens", *(f"{name}" for name in ("mean", "p50", "p90", "p99", "longest")))
    for name, lengths in (("prompt", found.prompt_tokens), ("answer", found.answer_tokens)):
        numbers = (lengths.p50, lengths.p90, lengths.p99, lengths.longest)
        table.add_row(name, f"{lengths.mean:.1f}", *(str(number) for number in numbers))
    _out.print(table)
