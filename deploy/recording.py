"""`evermoe record`: a routing record of made-up traffic on a real model, of any length, the same for one seed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from deploy.models import DEFAULT_MODEL, ensure_store
from predictor.records import RecordWriter
from replay.traffic import PROFILES, Request, Traffic

if TYPE_CHECKING:
    from deploy.virtual_engine import VirtualEngine

_LONGEST = 1024
"""Tokens of a request at most, answer included; less where the model's context is."""
_DEFAULT_MINUTES = 10.0


class RecordingError(ValueError):
    """Nothing can be recorded as asked; the message is one line for the operator."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What is asked for."""

    profile: str = "mixed"
    mix: Mapping[str, float] | None = None
    """Mean weights of the kinds of text; None: as the default model was trained."""
    load: float = 1.2
    """What arrives on average, as a part of what the engine can do on its virtual clock."""
    minutes: float | None = None
    """Virtual minutes, or ..."""
    steps: int | None = None
    """... steps; without either ten minutes."""
    seed: int = 0
    threads: int = 1
    """Of torch: small models gain little from more, and another number may sum in another order."""
    max_bytes: int = 1 << 30


def check_writable(file: Path) -> None:
    """Raise RecordingError where no record can be written to `file`."""
    folder = file.resolve().parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise RecordingError(f"{file} can't be written: give a file in a folder that exists and may be written to")


def parse_mix(text: str) -> dict[str, float]:
    """``code=3,chat=1`` as weights; raise RecordingError for anything else."""
    weights = {}
    for part in text.split(","):
        kind, _, weight = part.partition("=")
        try:
            weights[kind.strip()] = float(weight)
        except ValueError:
            raise RecordingError(
                f"--mix {text!r} is not understood: give kinds and their weights, as in code=3,chat=1"
            ) from None
    return weights


def record_traffic(model: Path | None, out: Path, recording: Recording, console: Console) -> None:
    """Write the record of `recording` to the Parquet file `out`, and tell how it went.

    Raise RecordingError, TextError, StoreError or ModelError for what can't be recorded.
    """
    check_writable(out)
    if recording.profile not in PROFILES:
        raise RecordingError(f"unknown --profile '{recording.profile}': choose one of {', '.join(PROFILES)}")
    store = ensure_store(model or DEFAULT_MODEL)
    from deploy.model.batches import MIXTURE
    from deploy.texts import token_streams
    from deploy.virtual_engine import VirtualEngine

    engine = VirtualEngine(store, threads=recording.threads)
    texts = token_streams(store.path, engine.shape.vocabulary)
    try:
        traffic = Traffic(
            texts,
            profile=recording.profile,
            mix=recording.mix or {str(kind): share for kind, share in MIXTURE.items()},
            requests_per_s=_rate(recording, engine),
            longest=min(_LONGEST, engine.context),
            seed=recording.seed,
        )
    except ValueError as error:
        raise RecordingError(str(error)) from error
    started = time.perf_counter()
    with RecordWriter(out, engine.shape, recording.max_bytes) as writer:
        _write(engine, iter(traffic), recording, writer, console)
    spent = time.perf_counter() - started
    console.print(
        f"{out}: {writer.written} steps in {engine.clock.now / 60:.1f} virtual minutes, "
        f"{out.stat().st_size / 1e6:.1f} MB; took {spent / 60:.1f} minutes"
        + (", then the file was full" if writer.full else ""),
        soft_wrap=True,
    )


def _rate(recording: Recording, engine: VirtualEngine) -> float:
    """Requests a second that keep the engine busy for the wanted part of its time, its batches full."""
    profiles = PROFILES[recording.profile]
    prompt = sum(profile.prompt_tokens for profile in profiles) / len(profiles)
    answer = sum(profile.answer_tokens for profile in profiles) / len(profiles)
    return recording.load / engine.request_s(prompt, answer)


def _write(
    engine: VirtualEngine, requests: Iterator[Request], recording: Recording, writer: RecordWriter, console: Console
) -> None:
    """Until there are as many steps or minutes as wanted, or the file is full."""
    minutes = _DEFAULT_MINUTES if recording.minutes is None and recording.steps is None else recording.minutes
    with Progress(TextColumn("recording"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), console=console,
                  transient=True) as bar:  # fmt: skip
        task = bar.add_task("", total=recording.steps or 60 * (minutes or 0))
        for loads in engine.run(requests):
            for load in loads:
                if writer.full or writer.written == recording.steps:
                    return
                writer.append(load)
            if minutes is not None and engine.clock.now >= 60 * minutes:
                return
            bar.update(task, completed=writer.written if recording.steps else engine.clock.now)
