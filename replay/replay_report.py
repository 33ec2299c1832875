"""What a replay leaves in its folder: ``summary.json``, PNG plots, and ``report.html`` with everything in it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from replay import replay_plots as plots
from replay.figures import inline_svg, write_png
from replay.page import Card, Page, PageTable
from replay.spans import tell_duration
from replay.summary import METRICS, Spread, Summary, Tally

COLUMNS = ("mean", "p50", "p90", "p99", "longest")
LATE_S = 0.005
"""What p99 of lateness may be before the report warns"""


@dataclass(frozen=True)
class Played:
    """What was played, for the report."""

    trace: str
    url: str
    model: str
    options: dict[str, Any]
    """What else was asked for"""
    prompts: str
    """What prompts were made of"""
    shortened: int = 0
    """Requests that did not fit into the model's context"""
    complete: bool = True
    """False: stopped before the trace had ended"""
    planned: int = 0
    """Requests of the selected trace"""


def write_report(folder: Path, played: Played, tally: Tally) -> Summary:
    """Write everything that is made of `tally` into `folder`, and return its summary."""
    summary = tally.summary()
    document = {**vars(played), **summary.as_json()}
    (folder / "summary.json").write_text(json.dumps(document, indent=2) + "\n")
    drawn = (
        ("load", partial(plots.draw_load, tally=tally), plots.LOAD_SIZE),
        ("latency", partial(plots.draw_latency, tally=tally), plots.LATENCY_SIZE),
        ("timeline", partial(plots.draw_timeline, tally=tally), plots.TIMELINE_SIZE),
    )
    figures = []
    if summary.sent:
        for name, draw, size in drawn:
            write_png(folder / f"{name}.png", draw, size)
            figures.append(inline_svg(draw, size, name))
    (folder / "report.html").write_text(page(played, summary, figures).html())
    return summary


def notices(played: Played, summary: Summary) -> list[str]:
    """What a reader must know before believing the numbers."""
    said = []
    if not played.complete:
        said.append(f"Stopped: {summary.sent} of {played.planned} requests had been sent.")
    if summary.late is not None and summary.late.p99 > LATE_S:
        said.append(
            f"Requests were sent {tell_duration(summary.late.p99)} late (p99, worst "
            f"{tell_duration(summary.late.longest)}): this machine was too busy to keep the trace's clock."
        )
    if played.shortened:
        said.append(f"{played.shortened} requests were shortened to the model's context.")
    return said


def latency_rows(summary: Summary) -> list[list[str]]:
    """The table of latencies, a metric a row."""
    found = {**{METRICS[name]: spread for name, spread in summary.latencies.items()}, "sent late by": summary.late}
    return [[name, *_cells(spread)] for name, spread in found.items()]


def page(played: Played, summary: Summary, figures: list[str]) -> Page:
    """The report's page."""
    options = ", ".join(f"{name} {value}" for name, value in played.options.items() if value is not None)
    errors = [[f"{kind}", str(count)] for kind, count in summary.errors.items()]
    tables = [PageTable("Times", ("", *COLUMNS), latency_rows(summary), "Requests that failed are left out.")]
    if errors:
        tables.append(PageTable("Errors", ("kind", "requests"), errors))
        tables.append(PageTable("For example", ("",), [[example] for example in summary.examples], wide=True))
    return Page(
        title=f"Replay of {played.trace}",
        lines=[f"{played.model} at {played.url}; prompts of {played.prompts}" + (f"; {options}" if options else "")],
        notices=notices(played, summary),
        cards=_cards(summary),
        tables=tables,
        figures=figures,
    )


def _cards(summary: Summary) -> list[Card]:
    cards = [
        Card("requests sent", f"{summary.sent}"),
        Card("failed", f"{summary.failed}", bad=summary.failed > 0),
        Card("answered per second", f"{summary.requests_per_s:.3g}"),
        Card("answer tokens per second", f"{summary.answer_tokens_per_s:.4g}"),
        Card("in all", tell_duration(summary.span_s)),
    ]
    if summary.goodput is not None and summary.good_part is not None:
        promised = ", ".join(f"{name} {tell_duration(v)}" for name, v in summary.slo.items() if v is not None)
        cards.append(Card(f"good per second: {summary.good_part:.1%} ({promised})", f"{summary.goodput:.3g}"))
    return cards


def _cells(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["-"] * len(COLUMNS)
    return [tell_duration(getattr(spread, name)) for name in COLUMNS]
