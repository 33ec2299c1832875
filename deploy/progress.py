"""How far the preparation of a store got, as a bar."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from deploy.models import Progress as Report


@contextlib.contextmanager
def preparation_bar(console: Console) -> Iterator[Report]:
    """A progress bar on `console`, and the function that moves it; it appears with the first progress."""
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task("preparing", total=None)

    def report(done: int, total: int, what: str) -> None:
        bar.start()
        bar.update(task, completed=done, total=total, description=f"preparing {what}")

    try:
        yield report
    finally:
        bar.stop()
