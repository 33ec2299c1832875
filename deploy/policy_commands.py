"""`evermoe policy schema`, `check`, `apply` and `show`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from deploy.fit import check_policy, this_host
from deploy.models import find_manifest, model_facts
from deploy.running import find_running
from deploy.status import fetch_status
from placement.policy import PolicyError, load_policy
from placement.policy.changes import Change, changes
from placement.policy.fitting import ModelFacts
from placement.policy.meaning import meaning
from placement.policy.schema import schema as json_schema
from placement.policy.writing import text, to_yaml

app = typer.Typer(name="policy", help="What the operator decides: check it, and change it live.", no_args_is_help=True)
_out = Console()

_TAKEN_OVER_S = 5.0
_POLL_S = 0.1

File = Annotated[Path, typer.Argument(help="Policy file (YAML).")]
Url = Annotated[str, typer.Option(help="Where the service listens.")]
Redis = Annotated[str | None, typer.Option(help="The service's Redis, where it is one of yours. Default: REDIS_URL.")]
_URL = "http://127.0.0.1:8000"


@app.command()
def schema() -> None:
    """Print the JSON schema of policy files, for editors."""
    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")


@app.command()
def check(
    file: File,
    model: Annotated[
        Path | None, typer.Option(help="Prepared store, or a checkpoint served before, that the policy should fit.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="The checkpoint's, as it was served.")] = "auto",
) -> None:
    """Say what a policy file means, or every mistake in it."""
    policy = load_policy(file)
    facts = None if model is None else _facts(model, dtype)
    check_policy(policy, file, facts, None)
    _say(f"{file} is valid" + ("" if facts else " (with --model it is also checked against a model)"))
    for line in meaning(policy, facts):
        _say(f"  {line}")
    try:
        check_policy(policy, file, None, [this_host(gpus=policy.wants_gpu)])
    except PolicyError as error:
        for line in str(error).splitlines():
            _say(f"  not for a cluster of this host alone: {line.removeprefix(f'{file}: ')}")


@app.command()
def apply(file: File, url: Url = _URL, redis: Redis = None) -> None:
    """Change the policy of a running service; a file with any mistake, or a change that needs a restart, is refused."""
    policy = load_policy(file)
    running = find_running(url, redis)
    check_policy(policy, file, running.published.model, None)
    found = changes(running.published.read(), policy)
    _refuse_restarts(file, found)
    if not found:
        _say(f"nothing changes: {url} goes by this policy already (version {running.published.version})")
        return
    version = running.apply(policy)
    width = max(len(change.key) for change in found)
    for change in found:
        _say(f"{change.key:<{width}}  {text(change.old)} -> {text(change.new)}")
    _say(f"version {version} is applied" + ("" if _taken_over(url, version) else "; not every gateway goes by it yet"))


@app.command()
def show(url: Url = _URL, redis: Redis = None) -> None:
    """Print the policy that a running service goes by, as YAML; what is not the default is marked."""
    running = find_running(url, redis)
    published = running.published
    made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(published.made_at))
    sys.stdout.write(f"# {published.model.name}: policy version {published.version}, of {made}\n")
    sys.stdout.write(to_yaml(published.read()))


def _facts(model: Path, dtype: str) -> ModelFacts:
    manifest = find_manifest(model, dtype=dtype)
    if manifest is None:
        raise PolicyError(f"{model}: is not prepared yet: give the store that `evermoe prepare {model} STORE` makes")
    return model_facts(manifest, model.resolve().name)


def _refuse_restarts(file: Path, found: list[Change]) -> None:
    """Raise PolicyError where not all of it can change while the service runs."""
    kept = [change for change in found if not change.live]
    if kept:
        raise PolicyError(
            *(f"{file}: {each.key}: {text(each.old)} -> {text(each.new)} needs a restart" for each in kept),
            f"{file}: nothing was applied: start the service anew with it, or leave {_these(kept)}",
        )


def _these(kept: list[Change]) -> str:
    return "this key as it is" if len(kept) == 1 else "these keys as they are"


def _taken_over(url: str, version: int) -> bool:
    """Whether all gateways go by it within some seconds."""
    deadline = time.monotonic() + _TAKEN_OVER_S
    while time.monotonic() < deadline:
        if all(gateway["policy_version"] >= version for gateway in fetch_status(url)["gateways"]):
            return True
        time.sleep(_POLL_S)
    return False


def _say(line: str) -> None:
    _out.print(escape(line), highlight=False, soft_wrap=True)
