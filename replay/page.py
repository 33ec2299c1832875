"""A report as one HTML page that needs nothing else: no scripts, no fonts, no pictures from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@dataclass(frozen=True)
class Card:
    """A number to be seen first."""

    name: str
    value: str
    bad: bool = False


@dataclass(frozen=True)
class PageTable:
    """A table; its first column has names."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    wide: bool = False
    """Whether the first column has sentences"""


@dataclass(frozen=True)
class Page:
    """What a report says, from top to bottom."""

    title: str
    lines: Sequence[str] = ()
    notices: Sequence[str] = ()
    """What the reader must know before anything else"""
    cards: Sequence[Card] = ()
    tables: Sequence[PageTable] = ()
    figures: Sequence[str] = field(default=())
    """SVG, see `replay.figures`"""

    def html(self) -> str:
        """The whole page. All text is escaped; figures are taken as they are."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
        )
        return environment.get_template("page.html").render(**vars(self))
