"""The Serve application: api, gateway, one deployment for each expert unit, and a store where none is given.

serve run deploy.app:build model=/path/to/checkpoint policy=policy.yaml
"""

import hashlib
import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from deploy.fit import check_policy, cluster_nodes
from deploy.models import DEFAULT_MODEL, cache_dir, ensure_store, model_facts
from deploy.planner.deployment import planner_deployment
from deploy.planner.steering import ModelSlices
from experts.deployment import expert_deployment
from gateway.api.deployment import api_deployment
from gateway.api.keys import load_keys
from gateway.api.served_model import ApiConfig
from gateway.deployment import gateway_deployment
from placement.cost import Speed
from placement.policy import Policy, load_policy
from placement.unit import Unit, make_units
from recovery.deployment import redis_deployment
from recovery.directory import Directory
from recovery.policies import start_policy

if TYPE_CHECKING:
    from experts.store import ExpertStore


class AppArgs(BaseModel):
    """What ``serve run`` and ``serve deploy`` can set; unknown names are refused."""

    model_config = ConfigDict(extra="forbid")

    model: str = str(DEFAULT_MODEL)
    """A checkpoint or a prepared store; on a cluster of several hosts, on a file system they share."""
    policy: str | None = None
    """Path of a policy file."""
    redis_url: str | None = None
    """A Redis server; default: REDIS_URL, and without that an embedded one (a cluster of one host)."""
    name: str | None = None
    """The model's name in the API; default: its folder's."""
    dtype: str = "auto"
    """Weights are served in this type: auto (the checkpoint's), float32, bfloat16 or float16."""
    listen: str | None = Field(default=None, pattern=r"^.+:\d{1,5}$")
    """HOST:PORT for the api to listen on itself, a good deal cheaper than Serve's proxy; default: the proxy."""


# No postponed annotations in this file: Serve reads this one to know that it must make an AppArgs of what it was given.
def build(args: AppArgs) -> serve.Application:
    """The application for `args`; raise StoreError, PolicyError or DirectoryError for what can't be served."""
    file = Path(args.policy) if args.policy else None
    policy = load_policy(file)
    store = ensure_store(Path(args.model), dtype=args.dtype)
    check_policy(policy, file, model_facts(store.manifest, model_name(args)), cluster_nodes())
    redis_url = args.redis_url or os.environ.get("REDIS_URL")
    if redis_url:
        Directory(redis_url, "probe").wait()
        return assemble(store, policy, redis_url, model_name(args), listen=_listen(args))
    folder = Path(tempfile.gettempdir()) / f"evermoe-{secrets.token_hex(6)}"
    url = f"unix://{folder}/redis.sock"
    embedded = redis_deployment(url)
    return assemble(store, policy, url, model_name(args), embedded, listen=_listen(args), redis_runs=False)


def model_name(args: AppArgs) -> str:
    """The name clients use."""
    return args.name or Path(args.model).resolve().name


def _listen(args: AppArgs) -> tuple[str, int] | None:
    if args.listen is None:
        return None
    host, _, port = args.listen.rpartition(":")
    return host.strip("[]"), int(port)


def assemble(
    store: "ExpertStore",
    policy: Policy,
    redis_url: str,
    name: str,
    *more: serve.Application,
    listen: tuple[str, int] | None,
    record: Path | None = None,
    redis_runs: bool = True,
) -> serve.Application:
    """The application of a store and a policy that meet in the Redis at `redis_url`; `more` nodes join it.

    The api listens on `listen`, or behind Serve's proxy (None). The gateway writes a routing record to `record`. A
    Redis that runs already is told of the policy. Raise KeySourceError for an API key that is not there.
    """
    keys = load_keys(policy.api.keys)
    namespace = namespace_of(store, policy, name)
    if redis_runs:  # what was applied to an earlier service is over
        start_policy(Directory(redis_url, namespace), policy, model_facts(store.manifest, name), keep=False)
    path, fingerprint = str(store.path), store.manifest.fingerprint
    units = make_units(policy.experts.unit, store.manifest.num_experts, store.manifest.moe_layers)
    compiled = str(cache_dir() / "compiled") if policy.gateway.compile else None
    experts = [expert_deployment(unit, path, policy.experts, redis_url, namespace, compiled) for unit in units]
    gateway = gateway_deployment(path, policy, redis_url, namespace, compiled, record)
    if policy.predictor.enabled:
        models = cache_dir() / "predictors" / fingerprint[:16]
        model = _slices(store, units)
        more = (*more, planner_deployment(policy, model, redis_url, namespace, str(models)))
    config = ApiConfig(store=store.path, model_name=name, policy=policy.api, keys=keys)
    return api_deployment(config, fingerprint, redis_url, namespace, listen, [gateway, *experts, *more])


def _slices(store: "ExpertStore", units: Sequence[Unit]) -> ModelSlices:
    manifest = store.manifest
    return ModelSlices(
        units=tuple(units),
        layers=tuple(manifest.moe_layers),
        experts=manifest.num_experts,
        slice_bytes=manifest.slice_bytes,
        speed=Speed.of(manifest.slice_bytes, manifest.slice_numbers),
    )


def namespace_of(store: "ExpertStore", policy: Policy, name: str) -> str:
    """Tells applications on one Redis apart; the same application deployed again finds its place again."""
    identity = f"{store.manifest.fingerprint} {policy.model_dump_json()} {name}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]
