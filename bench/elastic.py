"""Methods of scaling and placing experts side by side: MoE layer time on real Serve replicas with emulated devices.

The default model; eight devices of 1.5 and 0.5 times the same speed (and, where not --quick, eight alike), each with
memory for twice its part of the slices; one recorded stretch of traffic with bursts and a changing mix for every
method, which are changed by `evermoe policy apply`. Emulated: a replica returns its real result when such a device
would. Bars: layer time (median and p99) at least 45 % under static expert parallelism and 25 % under EPLB, and within
10 % of an oracle, on the unlike devices.   python -m bench.elastic
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bench.open_loop import Answer, run
from bench.report import finish, options
from bench.service import Service, serving
from deploy.model.batches import MIXTURE
from deploy.models import DEFAULT_MODEL, cache_dir, ensure_store
from deploy.texts import token_streams
from gateway.layer_times import quantile
from replay.traffic import Request, Traffic

STATIC, EPLB, ORACLE = 0.45, 0.25, 1.10
METHODS = ("static", "eplb", "moeless", "evermoe", "oracle")
DEVICES = 8
FLEETS = {"unlike": (1.5, 0.5), "alike": (1.0,)}
_MIB = 1 << 20
_SETTLE_S = 4.0


@dataclasses.dataclass(frozen=True)
class Layers:
    """How long MoE layers took in one run."""

    median_s: float
    p99_s: float
    failed: int

    def under(self, other: Layers) -> tuple[float, float]:
        """How far the median and the p99 lie under those of another run, as parts of them."""
        return 1 - self.median_s / other.median_s, 1 - self.p99_s / other.p99_s


def policy(method: str, speeds: Sequence[float], slice_bytes: int, slices: int, record: Path | None) -> dict[str, Any]:
    """Eight devices that may hold any slice, twice as many in all as the model has."""
    each = 2 * slices / DEVICES * slice_bytes / _MIB
    return {
        "experts": {
            "unit": {"experts": 8, "layers": "all"}, "replicas": DEVICES,
            "max_replicas": DEVICES, "memory_mib": round(each + 0.001, 3), "min_rows_per_replica": 1,
            "device": {"kind": "emulated", "rows_per_s": 800.0, "weight_read_ms": 5.0, "speeds": list(speeds)},
        },
        "gateway": {"max_batch_tokens": 256, "max_running": 32, "prefix_caching": False},  # the same prompts come again
        "planner": {
            "method": method, "idle_to_zero_s": None, "memory_mib": round(each * DEVICES + 0.01, 3),
            "foresight": str(record) if method == "oracle" else None,
        },
    }  # fmt: skip


def traffic(seconds: float) -> list[Request]:
    """About as much as the slowest method can do."""
    store = ensure_store(DEFAULT_MODEL)
    texts = token_streams(store.path, store.config().vocab_size)
    mix = {str(kind): share for kind, share in MIXTURE.items()}
    endless = Traffic(texts, profile="decode-heavy", mix=mix, requests_per_s=0.6, longest=512, seed=5)
    return list(itertools.takewhile(lambda request: request.time_s < seconds, endless))


class Bench:
    """One service that is taken through methods."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def wait(self) -> None:
        """Until all replicas are there."""
        seen: dict[str, float] = {}
        self.service.first_token()
        while not self.service.replicas_ready(seen):
            time.sleep(0.5)
        time.sleep(_SETTLE_S)

    def measure(self, requests: Sequence[Request]) -> Layers:
        """Serve `requests`; what MoE layers took meanwhile."""
        before = self._counts()
        answers = run(self.service.url, self.service.model, requests)
        counts = [after - earlier for after, earlier in zip(self._counts(), before, strict=True)]
        seconds = [quantile(counts, part) or 0.0 for part in (0.5, 0.99)]
        return Layers(seconds[0], seconds[1], sum(bool(_failed(answer)) for answer in answers))

    def _counts(self) -> list[int]:
        gateways = self.service.status()["gateways"]
        return [sum(column) for column in zip(*(gateway["layer_counts"] for gateway in gateways), strict=True)]


def _failed(answer: Answer) -> str:
    return answer.error or ("" if answer.token_s else "no token")


def compare(speeds: Sequence[float], methods: Sequence[str], requests: Sequence[Request]) -> dict[str, Layers]:
    """All methods on one fleet: the first is recorded, for the oracle."""
    manifest = ensure_store(DEFAULT_MODEL).manifest
    slices = len(manifest.moe_layers) * manifest.num_experts

    def of(method: str) -> dict[str, Any]:
        return policy(method, speeds, manifest.slice_bytes, slices, record)

    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record, file = folder / "record.parquet", folder / "first.yaml"
        turns = [methods[:1], methods[1:]] if "oracle" in methods else [methods]
        for turn, part in enumerate(turns):
            file.write_text(yaml.safe_dump(of(part[0])))
            more = ["--record", str(record)] if turn == 0 and len(turns) > 1 else []
            with serving(["--policy", str(file), *more], cache_dir()) as service:
                bench = Bench(service)
                bench.wait()
                for number, method in enumerate(part):
                    if number:
                        service.apply(of(method))
                        time.sleep(_SETTLE_S)
                    found[method] = bench.measure(requests)
                    print(_line(method, found[method], found), flush=True)
    return found


def _line(method: str, layers: Layers, found: dict[str, Layers]) -> str:
    parts = [f"  {method:9} layer median {1000 * layers.median_s:6.1f} ms, p99 {1000 * layers.p99_s:6.1f}"]
    parts += [f"under {other} {layers.under(found[other])[0]:4.0%}/{layers.under(found[other])[1]:4.0%}"
              for other in ("static", "eplb") if other in found and other != method]  # fmt: skip
    return ", ".join(parts) + (f", {layers.failed} FAILED" if layers.failed else "")


def main() -> None:
    """Measure, print and keep the figures."""
    opts = options(__doc__ or "")
    requests = traffic(12.0 if opts.quick else 60.0)
    fleets = {}
    for fleet, speeds in list(FLEETS.items())[: 1 if opts.quick else None]:
        print(f"{DEVICES} emulated devices, {fleet}: {len(requests)} requests for every method")
        fleets[fleet] = compare(speeds, ("static", "evermoe") if opts.quick else METHODS, requests)
    unlike = fleets["unlike"]
    static = min(unlike["evermoe"].under(unlike["static"]))
    passed = static >= STATIC and not any(each.failed for each in unlike.values())
    figure = f"elastic, unlike emulated devices: layer time {static:.0%} under static (bar {STATIC:.0%})"
    if "eplb" in unlike:
        eplb = min(unlike["evermoe"].under(unlike["eplb"]))
        oracle = unlike["evermoe"].median_s / unlike["oracle"].median_s
        passed &= eplb >= EPLB and oracle <= ORACLE
        figure += f", {eplb:.0%} under EPLB (bar {EPLB:.0%}), {oracle:.2f} times the oracle's (bar {ORACLE})"
    raw = {
        fleet: {method: dataclasses.asdict(layers) for method, layers in found.items()}
        for fleet, found in fleets.items()
    }
    finish("elastic", {"fleets": raw}, figure, passed=passed, check=opts.check)


if __name__ == "__main__":
    main()
