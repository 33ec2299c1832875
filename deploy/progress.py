"""`prepare` with a progress bar."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from experts.store import ExpertStore, prepare


def prepare_with_progress(model: Path, store: Path, dtype: str, console: Console) -> ExpertStore:
    """Prepare `model` into `store`, showing how far it got; raise StoreError as `prepare` does."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=None)
        return prepare(
            model, store, dtype=dtype,
            progress=lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
        )  # fmt: skip
