"""Output tokens a second against vLLM on the same machine: its own load generator, 64 tokens in, 64 out.

Bars, as multiples of vLLM's output tokens/s: experts inline 1.5x at 1, 8 and 32 clients, TTFT no worse; all experts in
2 replicas of 8 experts 1.2x at 8 and 32; in 16 replicas of one 1.0x at 32.   python -m bench.vs_vllm
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bench import models, vllm
from bench.report import finish, options
from bench.service import Service, serving

_TOKENS = 64
_WAVES = 4
_KV_CACHE_GIB = 2
_WARM_S = 300.0


@dataclass(frozen=True)
class Setup:
    """Where experts run, and how much faster than vLLM it must be: clients -> ratio."""

    name: str
    experts: dict[str, Any]
    inline: str
    bars: dict[int, float]
    ttft: bool = False

    def policy(self) -> str:
        """The policy file."""
        gateway = {"inline": self.inline, "kv_cache_gib": _KV_CACHE_GIB, "max_batch_tokens": 2048}
        return yaml.safe_dump({"experts": self.experts, "gateway": gateway})


SETUPS = (
    Setup("inline", {"replicas": 0}, "prefer", {1: 1.5, 8: 1.5, 32: 1.5}, ttft=True),
    Setup("2 replicas of 8 experts", {"unit": {"experts": 8}}, "fallback", {8: 1.2, 32: 1.2}),
    Setup("16 replicas of 1 expert", {"unit": {"experts": 1}}, "fallback", {32: 1.0}),
)


def main() -> None:
    """Run the comparison."""
    opts = options(__doc__ or "")
    model = models.mid()
    rounds, setups = (1, SETUPS[:1]) if opts.quick else (3, SETUPS)
    raw: dict[str, Any] = {}
    lowest, missed = float("inf"), []
    with vllm.serving(model, _KV_CACHE_GIB) as rival:
        for setup in setups:
            clients = [8] if opts.quick else list(setup.bars)
            raw[setup.name] = _compare(setup, model, rival, clients, rounds)
            for count in clients:
                speed, ttft = _ratios(raw[setup.name][count])
                lowest = min(lowest, speed / setup.bars[count])
                if speed < setup.bars[count] or (setup.ttft and ttft > 1):
                    missed.append(f"{setup.name} at {count}")
    figure = f"vs vLLM: worst {lowest:.2f} of its bar" + (f"; below: {', '.join(missed)}" if missed else "")
    finish("vs_vllm", {"runs": raw}, figure, passed=not missed, check=opts.check)


def _compare(setup: Setup, model: Path, rival: str, clients: list[int], rounds: int) -> dict[int, Any]:
    """Both servers in turn, with the same prompts; nobody's prompts are ever repeated."""
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        policy = Path(folder, "policy.yaml")
        policy.write_text(setup.policy())
        cache = Path(os.environ.get("EVERMOE_CACHE", Path(folder, "cache")))
        with serving([str(model), "--policy", str(policy)], cache) as service:
            _warm(service)
            for count in clients:
                runs: dict[str, list[dict[str, float]]] = {"vllm": [], "evermoe": []}
                before = _times(service)
                for turn in range(rounds):
                    seed = 1000 * len(results) + turn
                    runs["vllm"].append(_load(rival, str(model), model, count, seed))
                    runs["evermoe"].append(_load(service.url, service.model, model, count, seed))
                results[count] = runs
                _tell(setup, count, runs, before, _times(service))
    return results


def _load(url: str, name: str, model: Path, clients: int, seed: int) -> dict[str, float]:
    result = vllm.load(url, name, model, clients, tokens=_TOKENS, waves=_WAVES, seed=seed)
    return {key: result[key] for key in ("output_throughput", "median_ttft_ms", "median_tpot_ms", "mean_ttft_ms")}


def _warm(service: Service) -> None:
    """Until all replicas are ready and the decoder layers run compiled."""
    deadline = time.monotonic() + _WARM_S
    service.first_token()
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            list(service.stream("def main():", 2))
            if service.replicas_ready({}) and service.status()["gateways"][0]["compiled_layers"]:
                return
        time.sleep(1.0)
    raise RuntimeError("the service did not warm up: is there a C++ compiler?")


def _times(service: Service) -> dict[str, float]:
    gateway = service.status()["gateways"][0]
    return {"steps": gateway["steps"], **gateway["step_seconds"]}


def _median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def _ratios(runs: dict[str, list[dict[str, float]]]) -> tuple[float, float]:
    """Our output tokens/s over vLLM's, our TTFT over vLLM's."""
    speed, ttft = (
        _median(runs["evermoe"], key) / _median(runs["vllm"], key) for key in ("output_throughput", "median_ttft_ms")
    )
    return speed, ttft


def _tell(setup: Setup, clients: int, runs: dict[str, Any], before: dict[str, float], after: dict[str, float]) -> None:
    print(f"{setup.name}, {clients} clients")
    for name in ("vllm", "evermoe"):
        tokens, first, each = (
            _median(runs[name], key) for key in ("output_throughput", "median_ttft_ms", "median_tpot_ms")
        )
        print(f"  {name:8s} {tokens:6.1f} tok/s, TTFT {first:6.1f} ms, TPOT {each:5.1f} ms")
    steps = max(after["steps"] - before["steps"], 1)
    spent = {phase: 1000 * (after[phase] - before[phase]) / steps for phase in after if phase != "steps"}
    experts = sum(spent[phase] for phase in ("dispatch", "inline", "wait", "combine"))
    spent["attention side"] = spent.pop("forward") - experts
    breakdown = ", ".join(f"{phase} {ms:.2f}" for phase, ms in spent.items())
    speed, ttft = _ratios(runs)
    print(f"  {speed:.2f}x the speed (bar {setup.bars[clients]:.1f}x), {ttft:.2f}x the time to first token")
    print(f"  ms a step: {breakdown}", flush=True)


if __name__ == "__main__":
    main()
