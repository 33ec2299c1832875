"""The `evermoe` command. Bad input ends with one line on stderr and exit code 2."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deploy.models import cache_dir
from deploy.predictor_commands import app as predictor_app

app = typer.Typer(
    name="evermoe",
    help="Serverless Mixture-of-Experts serving: every expert is a deployment that comes and goes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(predictor_app)
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
) -> None:
    """Serve a Mixture-of-Experts model over an OpenAI-compatible HTTP API."""
    from deploy.serving import serve_model

    serve_model(model, host=host, port=port, policy_file=policy, name=name, dtype=dtype, console=_out)


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
def status(
    url: Annotated[str, typer.Option(help="Where the service listens.")] = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the experts of a running service: replicas, nodes, resident layers and calls by path."""
    from deploy.status import fetch_status, print_status

    report = fetch_status(url)
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        print_status(report, _out)


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
        _err.print(f"[bold red]error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _for_people(error: BaseException) -> bool:
    """Whether `error` is one of ours, worded for the operator."""
    return type(error).__module__.split(".")[0] in {
        "deploy",
        "experts",
        "gateway",
        "placement",
        "predictor",
        "recovery",
    }
