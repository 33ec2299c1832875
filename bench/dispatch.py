"""One MoE layer, 8 experts in 8 Serve replicas: the wire against Serve's DeploymentHandle calls, and against inline.

Bar: at 4 rows the wire takes at most a twentieth of the time of handle calls.   python -m bench.dispatch
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import serve

from bench.report import alternate, finish, median_ms, options
from deploy.launcher import local_ray
from deploy.models import DEFAULT_MODEL, ensure_store
from experts.deployment import ExpertReplica
from experts.ffn import ExpertFFN
from experts.store import ExpertStore
from gateway.dispatch import Dispatcher
from gateway.fleet import Fleet
from placement.policy import ExpertPolicy, UnitPolicy
from placement.unit import make_units
from recovery.directory import Directory
from recovery.redis_server import RedisServer

BAR = 20.0
LAYER = 1


class HandleReplica(ExpertReplica):
    """A replica that also answers through Serve, as an expert without a data plane of its own would."""

    def run(self, layer: int, expert: int, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The expert's output for `rows` (bf16 numbers travel as their bits)."""
        given = torch.from_numpy(rows).view(torch.bfloat16)
        out = torch.empty_like(given)
        self._replica.compute(layer, [(expert, len(given))], given, out)
        answer: np.ndarray[Any, Any] = out.view(torch.int16).numpy()
        return answer


class Root:
    """Hands out the handles of the expert deployments."""

    def __init__(self, *experts: Any) -> None:
        self._experts = experts

    def layer(self, parts: Sequence[tuple[int, np.ndarray[Any, Any]]]) -> None:
        """Not used: calls go from the driver straight to the experts."""


def main() -> None:
    """Run the comparison."""
    opts = options(__doc__ or "")
    store = ensure_store(DEFAULT_MODEL)
    folder = Path(tempfile.mkdtemp(prefix="evermoe-"))
    with RedisServer(folder / "redis") as redis, local_ray(folder):
        directory = Directory(redis.url, "bench")
        names = _deploy(store, directory)
        manifest = store.manifest
        with (
            Fleet(directory, directory.secret(), manifest.fingerprint) as fleet,
            Fleet(Directory(redis.url, "nobody"), b"", manifest.fingerprint) as nobody,
        ):
            while len(fleet.table.links) < len(names):
                time.sleep(0.05)
            direct = Dispatcher(fleet, ExpertFFN(store), manifest.num_experts, 1, 10.0)
            inline = Dispatcher(nobody, ExpertFFN(store), manifest.num_experts, 1, 10.0)
            handles = [serve.get_deployment_handle(name, "bench").options(method_name="run") for name in names]
            raw = {rows: _compare(rows, store, direct, inline, handles, 3 if opts.quick else 15) for rows in (4, 64)}
            direct.close()
            inline.close()
        serve.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
    ratio = raw[4]["handle"] / raw[4]["wire"]
    figure = f"dispatch, 4 rows, 8 experts: the wire is {ratio:.1f}x faster than handle calls (bar {BAR:.0f}x)"
    finish("dispatch", {"median_ms": raw}, figure, passed=ratio >= BAR, check=opts.check)


def _deploy(store: ExpertStore, directory: Directory) -> list[str]:
    policy = ExpertPolicy()
    units = make_units(UnitPolicy(), store.manifest.num_experts, store.manifest.moe_layers)
    experts = [
        serve.deployment(HandleReplica, name=unit.name, ray_actor_options={"num_cpus": 0}).bind(
            unit, str(store.path), policy, directory.url, "bench", None
        )
        for unit in units
    ]
    root = serve.deployment(Root, ray_actor_options={"num_cpus": 0}).bind(*experts)
    serve.run(root, name="bench", route_prefix=None)
    return [unit.name for unit in units]


def _compare(
    rows: int, store: ExpertStore, direct: Dispatcher, inline: Dispatcher, handles: list[Any], rounds: int
) -> dict[str, float]:
    manifest = store.manifest
    hidden = torch.randn(rows, manifest.hidden_size).to(getattr(torch, manifest.dtype))
    index = (torch.arange(rows * manifest.top_k) % manifest.num_experts).view(rows, manifest.top_k)  # all experts
    weights = torch.full((rows, manifest.top_k), 1 / manifest.top_k)

    def by_handle() -> torch.Tensor:
        parts = [(e, torch.nonzero(index == e)) for e in range(manifest.num_experts)]
        waiting = [handles[e].remote(LAYER, e, hidden[at[:, 0]].view(torch.int16).numpy()) for e, at in parts]
        out = torch.zeros(rows, manifest.hidden_size)
        for (_, at), answer in zip(parts, waiting, strict=True):
            result = torch.from_numpy(answer.result().copy()).view(torch.bfloat16)  # Ray gives read-only arrays
            out.index_add_(0, at[:, 0], result.float() * weights[at[:, 0], at[:, 1], None])
        return out.to(hidden.dtype)

    def wire() -> torch.Tensor:
        return direct(LAYER, hidden, index, weights)

    def local() -> torch.Tensor:
        return inline(LAYER, hidden, index, weights)

    for _ in range(5):  # first calls map pages and open connections
        torch.testing.assert_close(by_handle(), wire(), rtol=0.02, atol=0.02)
        torch.testing.assert_close(wire(), local(), rtol=0.02, atol=0.02)
    seconds = alternate({"handle": by_handle, "wire": wire, "inline": local}, rounds, block=20)
    medians = {name: median_ms(values) for name, values in seconds.items()}
    print(
        f"{rows:3d} rows: "
        + ", ".join(f"{name} {ms:.3f} ms" for name, ms in medians.items())
        + f"; handle/wire {medians['handle'] / medians['wire']:.1f}x, "
        f"wire/inline {medians['wire'] / medians['inline']:.2f}x"
    )
    return medians


if __name__ == "__main__":
    main()
