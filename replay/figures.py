"""Figures for files and for pages: a PNG as it is, or SVG in a page whose colours follow the reader's theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

BLUE, ORANGE, GREEN, RED, GREY = "#3b82c4", "#e08a2e", "#3f9e6e", "#d0524f", "#8a8f98"
"""Readable on white and on black"""
_INK, _LINE = "#010203", "#040506"  # stand for the page's colours
_STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.linewidth": 0.6,
    "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False, "lines.linewidth": 1.4,
}  # fmt: skip
_PAGE = {
    "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.edgecolor": _LINE,
    "grid.color": _LINE, "svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "evermoe",
}  # fmt: skip
Draw = Callable[[Any], None]
"""Draws on a matplotlib figure that is empty."""


def write_png(path: Path, draw: Draw, size: tuple[float, float]) -> None:
    """Write what `draw` draws; `size` in inches."""
    with _figure(_STYLE, size) as figure:
        draw(figure)
        figure.savefig(path, dpi=110, facecolor="white")


def inline_svg(draw: Draw, size: tuple[float, float], label: str) -> str:
    """What `draw` draws as an ``<svg>`` to stand in a page, with the page's text colour; `label` is read aloud."""
    text = io.StringIO()
    with _figure({**_STYLE, **_PAGE}, size) as figure:
        draw(figure)
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor").replace(_LINE, "var(--line)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    own = re.sub(r"\W+", "-", label.lower())  # ids of several figures in one page must not meet
    svg = re.sub(r'\bid="', f'id="{own}-', svg)
    svg = re.sub(r"(url\(#|href=\"#)", rf"\1{own}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


@contextmanager
def _figure(style: dict[str, Any], size: tuple[float, float]) -> Iterator[Any]:
    from matplotlib import pyplot

    with matplotlib.rc_context(style):
        figure = pyplot.figure(figsize=size, layout="constrained")
        try:
            yield figure
        finally:
            pyplot.close(figure)
