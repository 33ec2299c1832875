"""How fast traces are read, and in how much memory: Azure 2024's layout with as many rows as its largest file.

Bar: 16.8 M rows in under a minute of processor time, and no more memory than for a tenth of them.
python -m bench.traces
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ROWS = 16_800_000
SPAN_S = 7 * 86400
BAR_S = 60.0
BAR_MEMORY = 1.15
_PART = 200_000


def write_trace(path: Path, rows: int) -> None:
    """A week's trace in Azure's layout of 2024."""
    random = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(b"TIMESTAMP,ContextTokens,GeneratedTokens\n")
        for start in range(0, rows, _PART):
            count = min(_PART, rows - start)
            micros = (np.arange(start, start + count) * (SPAN_S * 1e6 / rows)).astype(np.int64) + 1_715_299_200_000_000
            stamps = pc.strftime(pa.array(micros.view("datetime64[us]")), "%Y-%m-%d %H:%M:%S+00:00").to_pylist()
            lengths = random.lognormal(6.5, 1.2, (2, count)).astype(int).tolist()
            lines = (f"{stamp},{a},{b}\n" for stamp, a, b in zip(stamps, *lengths, strict=True))
            file.write("".join(lines).encode())


def read_trace(path: Path) -> None:
    """Read the whole trace as `evermoe trace info` does, in this process; print what it took as JSON."""
    from replay.reading import Trace
    from replay.statistics import describe

    base = _peak_mib()
    started, cpu = time.perf_counter(), time.process_time()
    found = describe(Trace(path, strict=True))
    taken = {
        "rows": found.requests,
        "seconds": time.perf_counter() - started,
        "cpu_s": time.process_time() - cpu,
        "base_mib": base,
        "peak_mib": _peak_mib(),
    }
    sys.stdout.write(json.dumps(taken))


def _peak_mib() -> float:
    """The most memory this process has had so far."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def measure(rows: int, folder: Path) -> dict[str, float]:
    """What reading `rows` rows takes, in a process of its own."""
    path = folder / f"{rows}.csv"
    write_trace(path, rows)
    done = subprocess.run([sys.executable, "-m", "bench.traces", "read", str(path)], check=True, capture_output=True)
    path.unlink()
    taken: dict[str, float] = json.loads(done.stdout)
    print(
        f"{rows:>9} rows: {taken['cpu_s']:.2f} s of processor time, {rows / taken['cpu_s'] / 1e6:.2f} M rows/s, "
        f"peak {taken['peak_mib']:.0f} MiB ({taken['base_mib']:.0f} before the first row)",
        flush=True,
    )
    return taken


def main() -> None:
    """Measure, print and keep the figures."""
    from bench.report import finish, options  # not above: it brings torch along, also to who only reads

    opts = options(__doc__ or "")
    rows = ROWS // 10 if opts.quick else ROWS
    with tempfile.TemporaryDirectory(prefix="evermoe-") as folder:
        small, large = (measure(count, Path(folder)) for count in (rows // 10, rows))
    growth = large["peak_mib"] / small["peak_mib"]
    finish(
        "traces",
        {"small": small, "large": large},
        f"{rows / 1e6:.1f} M rows in {large['cpu_s']:.1f} s of processor time ({rows / large['cpu_s'] / 1e6:.2f} M "
        f"rows/s), peak {large['peak_mib']:.0f} MiB, {growth:.2f}x that of a tenth of them",
        passed=large["cpu_s"] < BAR_S * rows / ROWS and growth < BAR_MEMORY,
        check=opts.check,
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["read"]:
        read_trace(Path(sys.argv[2]))
    else:
        main()
