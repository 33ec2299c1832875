"""`evermoe predictor train` and `eval`: thin commands around the pure room."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from predictor.evaluation import Evaluation
    from predictor.model import LoadModel
    from predictor.records import Records

app = typer.Typer(name="predictor", help="Forecasts of expert load: train and judge them.", no_args_is_help=True)
_out = Console()

Recordings = Annotated[list[Path], typer.Argument(help="Routing records: files, or folders of *.parquet files.")]


@app.command()
def train(
    records: Recordings,
    out: Annotated[Path, typer.Option(help="Folder that the predictor is kept in; versions are numbered.")],
    seed: Annotated[int, typer.Option(help="Same records, same seed: same predictor.")] = 0,
) -> None:
    """Train a load predictor from routing records, and say what each layer chose, and why."""
    from predictor.storage import save
    from predictor.training import train as fit

    recordings = _read(records)
    started = time.perf_counter()
    model = fit(recordings, seed=seed)
    spent = time.perf_counter() - started
    version = save(model, out)
    for line in _choices(model):
        _out.print(line, highlight=False, soft_wrap=True)
    _out.print(f"{out}: version {version}, from {model.trained_steps} steps in {spent:.1f} s", soft_wrap=True)


@app.command(name="eval")
def evaluate(
    predictor: Annotated[Path, typer.Argument(help="Folder of a trained predictor; its newest version is judged.")],
    records: Recordings,
    plot: Annotated[
        Path | None, typer.Option(help="PNG to write, for each horizon. Default: `forecast-HORIZON.png` in the folder.")
    ] = None,
) -> None:
    """Judge a predictor on records it has not seen: a table for each horizon, and pictures."""
    from predictor.evaluation import evaluate as judge
    from predictor.plot import draw
    from predictor.storage import load

    recordings = _read(records)
    model = load(predictor, recordings[0].shape)
    for evaluation in judge(model, recordings):
        print_evaluation(evaluation, _out)
        name = f"-{evaluation.horizon}".replace(" ", "-") + ".png"
        path = plot.with_name(plot.stem + name) if plot else predictor / f"forecast{name}"
        draw(model, recordings[0], evaluation.horizon, path)
        _out.print(f"forecast and actual load over time: {path}\n", soft_wrap=True)


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """The table of one horizon, and what follows from it."""
    from predictor.evaluation import BASELINES

    table = Table(
        title=f"Next {evaluation.horizon}: error of shares, {evaluation.moments} moments", title_justify="left"
    )
    table.add_column("layer")
    for layer in (*evaluation.layers, "mean"):
        table.add_column(str(layer), justify="right")
    for name, errors in evaluation.errors.items():
        mark = "*" if name == evaluation.best_baseline else ""
        style = "bold" if name == "chosen" else "" if name in (*BASELINES, "mixture", "lightgbm") else "dim"
        table.add_row(f"{name}{mark}", *(f"{error:.4f}" for error in (*errors, errors.mean())), style=style)
    table.add_row("noise floor", *(f"{e:.4f}" for e in (*evaluation.floor, evaluation.floor.mean())), style="dim")
    table.add_section()
    table.add_row("carried by", *(choice.method for choice in evaluation.choices), "")
    table.add_row("its part", *(f"{choice.part:.0%}" for choice in evaluation.choices), "")
    for name in (evaluation.best_baseline, "chosen", *(["oracle tokens"] if evaluation.reachable is not None else [])):
        recall = evaluation.recall[name]
        table.add_row(f"two hottest found, {name}", *(f"{part:.0%}" for part in (*recall, recall.mean())))
    coverage = evaluation.coverage
    table.add_row("within p90", *(f"{part:.1%}" for part in (*coverage, coverage.mean())))
    console.print(table)
    if evaluation.reachable is not None:
        console.print(
            f"of the way down to one who knows which tokens come (oracle tokens), {evaluation.reachable:.0%} are gone; "
            f"of the way to the noise floor {evaluation.gap_closed:.0%}; weighted by rows, the error is "
            f"{evaluation.by_rows:.2f}x the best baseline's",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"{evaluation.ratio:.2f}x the error of the best baseline ({evaluation.best_baseline}*); the worst layer "
        f"{evaluation.worst_layer:.2f}x its own; {evaluation.gap_closed:.0%} of the gap to the noise floor closed; "
        f"{evaluation.known:.0%} of the rows were queued or running before, and where nearly all were, the error is "
        f"{evaluation.known_ratio:.2f}x; {evaluation.seconds * 1e3:.2f} ms per layer",
        highlight=False,
        soft_wrap=True,
    )


def _choices(model: LoadModel) -> list[str]:
    return [
        f"next {horizon}, layer {layer}: {choice.reason}"
        for horizon, part in model.horizons.items()
        for layer, choice in zip(model.shape.layers, part.choices, strict=True)
    ]


def _read(paths: list[Path]) -> list[Records]:
    """All records of `paths`; raise RecordError for what is none, or of different models."""
    from predictor.records import RecordError, read_records

    files = [file for path in paths for file in (sorted(path.glob("*.parquet")) if path.is_dir() else [path])]
    if not files:
        raise RecordError(f"{paths[0]} holds no records (*.parquet); make some with `evermoe record`")
    recordings = [read_records(files[0])]
    return recordings + [read_records(file, recordings[0].shape) for file in files[1:]]
