"""The operator's policy: one YAML file that says how experts are cut into deployments, scaled and run.

Unknown keys are refused with the nearest known one; every error names the file, the key and the remedy.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class PolicyError(ValueError):
    """The policy file can't be used; the message is one line for the operator."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class UnitPolicy(_Section):
    """The grain of elasticity: what one Serve deployment holds."""

    experts: int = Field(default=1, ge=1)
    """Experts in one deployment."""
    layers: int | Literal["all"] = Field(default="all")
    """MoE layers in one deployment."""

    @model_validator(mode="after")
    def _some_layers(self) -> UnitPolicy:
        if self.layers != "all" and self.layers < 1:
            raise ValueError("layers: at least 1, or 'all'")
        return self


class ResourcePolicy(_Section):
    """What Ray reserves for one replica."""

    cpu: float = Field(default=0.0, ge=0)
    """Logical CPUs. 0 (default) lets the operating system share the cores."""
    gpu: float = Field(default=0.0, ge=0)
    """Fraction of a GPU."""


class ExpertPolicy(_Section):
    """Expert deployments."""

    unit: UnitPolicy = UnitPolicy()
    replicas: int = Field(default=1, ge=0)
    """Replicas of each unit to start with; 0 runs every expert inline until something scales it."""
    max_replicas: int = Field(default=8, ge=1)
    """Most replicas of one unit."""
    resources: ResourcePolicy = ResourcePolicy()
    threads: int = Field(default=1, ge=1)
    """Torch threads of one replica."""
    min_rows_per_replica: int = Field(default=32, ge=1)
    """An expert's rows are split over its replicas only in parts of at least this many: a part re-reads the weights."""

    @model_validator(mode="after")
    def _within_bounds(self) -> ExpertPolicy:
        if self.replicas > self.max_replicas:
            raise ValueError(f"replicas: {self.replicas} is more than max_replicas ({self.max_replicas})")
        return self


class GatewayPolicy(_Section):
    """The persistent side."""

    replicas: int = Field(default=1, ge=1, le=64)
    """Gateways, each with its own KV cache. With two or more the others take over at once when one is lost."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` takes CUDA where there is one."""
    threads: int = Field(default=0, ge=0)
    """Torch threads; 0 takes one per core."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Memory for cached keys and values, GiB."""
    max_batch_tokens: int = Field(default=512, ge=1)
    """Rows in one step at most: longer prompts are prefilled in chunks."""
    max_running: int = Field(default=64, ge=1)
    """Sequences in one step at most."""
    max_waiting: int = Field(default=1024, ge=0)
    """Sequences that wait for a place at most; more are refused with status 429."""
    prefix_caching: bool = True
    """Keep finished sequences' keys and values while there is room, for prompts that begin alike."""
    inline: Literal["fallback", "prefer", "never"] = "fallback"
    """Where the gateway computes experts itself: `fallback` only what no replica serves, `prefer` also whatever is
    faster here than over the wire (the weights are then held in the gateway's memory), `never` waits for replicas."""
    compile: bool = True
    """Compile the decoder layers in the background, at the lowest priority, where there is a C++ compiler."""
    call_deadline_s: float = Field(default=10.0, gt=0)
    """A replica that has not answered by then is given up and its rows run elsewhere (usually far sooner)."""

    @model_validator(mode="after")
    def _room_for_all(self) -> GatewayPolicy:
        if self.max_batch_tokens < self.max_running:
            raise ValueError(
                f"max_batch_tokens: {self.max_batch_tokens} has no room for one token of each of "
                f"max_running ({self.max_running}) sequences"
            )
        return self


class KeyPolicy(_Section):
    """One client's API key and what it may use. The key itself never stands in the policy."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """How logs and errors call the client."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    """The key's SHA-256, in hexadecimal ..."""
    env: str | None = Field(default=None, min_length=1)
    """... or the environment variable that holds the key ..."""
    file: Path | None = None
    """... or a file that holds nothing else."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Requests at a time."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Prompt tokens, counted before a request, and generated ones, counted after it."""

    @model_validator(mode="after")
    def _one_source(self) -> KeyPolicy:
        if sum(source is not None for source in (self.sha256, self.env, self.file)) != 1:
            raise ValueError("give one of sha256, env and file")
        return self


class ApiPolicy(_Section):
    """The HTTP edge."""

    keys: tuple[KeyPolicy, ...] = ()
    """Who may ask; nobody is asked for a key where none are listed."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may call from a browser; "*" is any."""
    max_body_mib: float = Field(default=16.0, gt=0, le=1024)
    """Largest request body, MiB."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """A request's body must have arrived by then."""
    request_timeout_s: float | None = Field(default=None, gt=0)
    """A request ends in an error after so long, unless its x-request-timeout header says less; none by default."""
    drain_s: float = Field(default=30.0, ge=0, le=3600)
    """What running requests get to finish when the service ends."""
    request_log: Path | None = None
    """File for the log of requests, one JSON object a line; by default the process's standard output."""

    @model_validator(mode="after")
    def _names_differ(self) -> ApiPolicy:
        names = [key.name for key in self.keys]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"keys: two are called '{twice}'")
        return self


class PredictorPolicy(_Section):
    """The forecast of expert load."""

    enabled: bool = True
    """Watch what is routed, and forecast it."""
    interval_s: float = Field(default=1.0, ge=0.1, le=60)
    """Between two forecasts."""
    horizon_s: float = Field(default=3.0, ge=0.1, le=60)
    """How far a forecast looks."""
    models: Path | None = None
    """Folder of trained predictors (`evermoe predictor train`), to begin with and to keep later ones in; by default
    one in the cache, by the model's fingerprint."""
    train: bool = True
    """Learn from the traffic, in the background and at the lowest priority."""


class Policy(_Section):
    """A whole policy file; every part has a default."""

    experts: ExpertPolicy = ExpertPolicy()
    gateway: GatewayPolicy = GatewayPolicy()
    api: ApiPolicy = ApiPolicy()
    predictor: PredictorPolicy = PredictorPolicy()


def load_policy(path: Path | None) -> Policy:
    """The policy of a YAML file, or the default one; raise PolicyError naming file, key and remedy."""
    if path is None:
        return Policy()
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise PolicyError(f"{path}: can't be read ({error.strerror}): give the path of a YAML file") from error
    except yaml.YAMLError as error:
        raise PolicyError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return parse_policy(document, str(path))


def parse_policy(document: Any, name: str) -> Policy:
    """The policy of a parsed document (None: all defaults); `name` is its file in errors."""
    if document is None:
        return Policy()
    if not isinstance(document, dict):
        raise PolicyError(f"{name}: a policy is a mapping with {_keys(Policy)}, not a {type(document).__name__}")
    try:
        return Policy.model_validate(document)
    except ValidationError as error:
        raise PolicyError(f"{name}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        reason = first["msg"].removeprefix("Value error, ")
        if first["loc"][:2] == ("api", "keys"):
            return f"{where}: {reason}"  # what was given may be a key
        return f"{where}: {reason} (got {first['input']!r})" if where else reason
    *parents, key = first["loc"]
    section = _section(parents)
    near = difflib.get_close_matches(str(key), section.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known keys: {_keys(section)}"
    return f"unknown key '{where}': {hint}"


def _section(path: list[int | str]) -> type[BaseModel]:
    section: type[BaseModel] = Policy
    for name in path:
        if isinstance(name, int):
            continue  # an item of the list before: its type is known already
        annotation = section.model_fields[name].annotation
        (annotation,) = get_args(annotation)[:1] or (annotation,)
        assert isinstance(annotation, type)
        section = annotation
    return section


def _keys(section: type[BaseModel]) -> str:
    return ", ".join(section.model_fields)
