"""Memory: preparing and serving a 1.3 GB checkpoint.   python -m bench.memory

Bars: preparation peaks under 1 GB of private memory; the gateway holds no expert weights once all experts have
replicas; a replica's private memory is its slices plus a fixed cost.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.report import finish, options
from bench.service import Service, private_mib, serving
from experts.store import ExpertStore

PREPARE_BAR_MIB = 1000 * 1000**2 / 2**20


def main() -> None:
    """Prepare, serve, and look at the processes from outside. `--quick` serves without waiting for all replicas."""
    opts = options(__doc__ or "")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "bench.checkpoint", str(folder / "big")], check=True)
        peak, seconds = _prepare(folder / "big", folder / "store")
        print(f"prepare: {_gib(folder / 'big'):.2f} GiB in {seconds:.1f} s, peak private memory {peak:.0f} MiB")
        served = _serve(folder, opts.quick)
    passed = peak < PREPARE_BAR_MIB and served["gateway_holds_mib"] < served["slice_mib"]
    figure = (
        f"memory: preparation peaks at {peak:.0f} MiB (bar {PREPARE_BAR_MIB:.0f}); with all replicas up the gateway "
        f"holds {served['gateway_holds_mib']:.0f} of {served['experts_mib']:.0f} MiB expert weights"
    )
    finish(
        "memory", {"prepare_peak_mib": peak, "prepare_s": seconds, **served}, figure, passed=passed, check=opts.check
    )


def _prepare(checkpoint: Path, store: Path) -> tuple[float, float]:
    """Peak private memory in MiB and seconds of `evermoe prepare`, sampled every few milliseconds."""
    start = time.monotonic()
    command = [str(Path(sys.executable).parent / "evermoe"), "prepare", str(checkpoint), str(store)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        try:
            peak = max(peak, private_mib(process.pid))
        except OSError:
            break
        time.sleep(0.02)
    if process.wait():
        raise RuntimeError("`evermoe prepare` failed")
    return peak, time.monotonic() - start


def _serve(folder: Path, quick: bool) -> dict[str, Any]:
    store = ExpertStore.open(folder / "store")
    slices = [
        (folder / "store" / "experts" / f"{e}.safetensors").stat().st_size for e in range(store.manifest.num_experts)
    ]
    experts_mib = sum(slices) / 2**20
    with serving([str(folder / "store")], folder / "cache") as service:
        service.first_token()
        gateway = service.status()["gateways"][0]["pid"]
        inline = _weights_mapped(gateway, folder / "store")
        print(
            f"gateway before its replicas: {private_mib(gateway):.0f} MiB private, {inline:.0f} MiB of experts mapped"
        )
        seen: dict[str, float] = {}
        while not service.replicas_ready(seen):
            time.sleep(0.2)
        list(service.stream("def main():", 8 if quick else 64))
        gateway_mib, mapped = private_mib(gateway), _weights_mapped(gateway, folder / "store")
        replicas = _replicas(service)
    slice_mib = slices[0] / 2**20
    median = sorted(replicas)[len(replicas) // 2]
    print(f"gateway with all replicas: {gateway_mib:.0f} MiB private, {mapped:.0f} MiB of experts mapped")
    fixed = median - slice_mib
    print(f"replica (median): {median:.0f} MiB private = slices {slice_mib:.0f} MiB + fixed {fixed:.0f} MiB")
    return {
        "gateway_private_mib": gateway_mib, "gateway_holds_mib": mapped, "gateway_inline_mib": inline,
        "experts_mib": experts_mib, "slice_mib": slice_mib, "replica_private_mib": replicas, "fixed_mib": fixed,
    }  # fmt: skip


def _replicas(service: Service) -> list[float]:
    return [private_mib(replica["pid"]) for unit in service.status()["units"] for replica in unit["replicas"]]


def _weights_mapped(pid: int, store: Path) -> float:
    """MiB of expert files that a process has in memory through its mappings (shared or not)."""
    resident, counts = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0] and ":" not in line.split(" ", 1)[0]:
            counts = f"{os.path.realpath(store)}/experts/" in line
        elif counts and line.startswith("Rss:"):
            resident += int(line.split()[1])
    return resident / 1024


def _gib(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 2**30


if __name__ == "__main__":
    main()
