"""The `evermoe` command. Bad input ends with one line for each mistake on stderr and exit code 2."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from deploy.models import cache_dir
from deploy.policy_commands import app as policy_app
from deploy.predictor_commands import app as predictor_app
from deploy.replay_commands import replay
from deploy.trace_commands import app as trace_app

app = typer.Typer(
    name="evermoe",
    help="Serverless Mixture-of-Experts serving: every expert is a deployment that comes and goes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(policy_app)
app.add_typer(predictor_app)
app.add_typer(trace_app)
app.command()(replay)
_OURS = {"deploy", "experts", "gateway", "placement", "predictor", "recovery", "replay"}
_out = Console()
_err = Console(stderr=True)


@app.command()
def serve(
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder or prepared store. Default: the model in the box.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    policy: Annotated[Path | None, typer.Option(help="Policy file (YAML).")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in the API. Default: its folder's.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    record: Annotated[
        Path | None,
        typer.Option(help="Record what is routed in this file; it is complete when the service has ended."),
    ] = None,
) -> None:
    """Serve a Mixture-of-Experts model over an OpenAI-compatible HTTP API."""
    from deploy.serving import serve_model

    serve_model(model, host=host, port=port, policy_file=policy, name=name, dtype=dtype, record=record, console=_out)


@app.command()
def prepare(
    model: Annotated[Path, typer.Argument(help="Hugging Face checkpoint folder.")],
    store: Annotated[Path, typer.Argument(help="Folder to write the expert store to.")],
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Rewrite a checkpoint as an expert store: one file for the gateway and one for each expert."""
    from deploy.progress import preparation_bar
    from experts.store import prepare as convert

    with preparation_bar(_out) as progress:
        manifest = convert(model, store, dtype=dtype, progress=progress).manifest
    _out.print(
        f"{store}: {manifest.architecture}, {len(manifest.moe_layers)} MoE layers x {manifest.num_experts} experts "
        f"top-{manifest.top_k}, {manifest.dtype}"
    )


@app.command()
def record(
    out: Annotated[Path, typer.Argument(help="File to write (Parquet).")],
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint folder or prepared store. Default: the model in the box.")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="prefill-heavy (250 tokens in, 24 out), decode-heavy (170 in, 80 out) or mixed.")
    ] = "mixed",
    mix: Annotated[
        str | None,
        typer.Option(help="Mean weights of kinds of text: code=3,docs=1,chat=2. Default: as trained."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="How long, on the engine's virtual clock. Default: 10.", min=0.01)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="How long, in steps of the engine.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same record.", min=0)] = 0,
    load: Annotated[
        float, typer.Option(help="What arrives on average, as a part of what can be done.", min=0.01, max=2.0)
    ] = 1.2,
    threads: Annotated[int, typer.Option(help="Torch threads.", min=1)] = 1,
    max_mib: Annotated[int, typer.Option(help="The file's size at most, MiB.", min=1)] = 1024,
) -> None:
    """Record how a model routes made-up traffic: what the load predictor learns from."""
    from deploy.recording import Recording, parse_mix, record_traffic

    asked = Recording(
        profile=profile, mix=parse_mix(mix) if mix else None, load=load, minutes=minutes, steps=steps, seed=seed,
        threads=threads, max_bytes=max_mib << 20,
    )  # fmt: skip
    record_traffic(model, out, asked, _out)


@app.command()
def status(
    url: Annotated[str, typer.Option(help="Where the service listens.")] = "http://127.0.0.1:8000",
    why: Annotated[bool, typer.Option("--why", help="Also say why each unit has so many replicas.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show the experts of a running service: replicas and their devices, resident slices, rows, and the plan."""
    from deploy.status import fetch_status
    from deploy.status_table import print_status

    report = fetch_status(url)
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        print_status(report, _out, why=why)


@app.command()
def chaos(
    scenario: Annotated[Path, typer.Argument(help="Scenario file (YAML); examples are in recovery/scenarios.")],
    url: Annotated[str, typer.Option(help="Where the service listens.")] = "http://127.0.0.1:8000",
    seed: Annotated[int | None, typer.Option(help="Instead of the scenario's.", min=0)] = None,
    out: Annotated[Path | None, typer.Option(help="File for the report (JSON).")] = None,
) -> None:
    """Break a running service on purpose while clients stream from it; exit 1 where they notice more than a pause."""
    from deploy.chaos import run_chaos

    if not run_chaos(scenario, url, seed, out, _out):
        sys.exit(1)


def main() -> None:
    """Entry point: errors made for people become one line and exit code 2."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is ever fetched behind the operator's back
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))  # else torch leaves it in /tmp
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        if not _for_people(error):
            raise
        for line in str(error).splitlines():
            _err.print(f"[bold red]error:[/] {escape(line)}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _for_people(error: BaseException) -> bool:
    """Whether `error` is one of ours, worded for the operator."""
    return type(error).__module__.split(".")[0] in _OURS


if __name__ == "__main__":
    main()
