"""How exactly the replayer keeps a trace's clock, and what it takes itself: 200 requests/s to a server beside it.

Bar: requests reach the server within 5 ms of their time (99 %), and the replayer takes under half a core.
python -m bench.replayer
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import uvloop

from bench.report import finish, options
from bench.sse_server import sse_server
from replay.client import Client, go_first
from replay.connection import Connections
from replay.outcome import Outcome
from replay.prompts import Prompts
from replay.replayer import Asking, Replayer
from replay.trace import TraceRequest

RATE = 200.0
PROMPT_TOKENS = 256
GAP_S = 0.03
BAR_MS = 5.0
BAR_CORES = 0.5
_TEXT = {"any": np.random.default_rng(0).integers(0, 4096, 1 << 16).astype(np.int32)}


def trace(seconds: float, tokens: int) -> Iterator[TraceRequest]:
    """Independent arrivals."""
    times = np.cumsum(np.random.default_rng(0).exponential(1 / RATE, int(RATE * seconds)))
    return (TraceRequest(n, float(t), PROMPT_TOKENS, tokens) for n, t in enumerate(times))


async def play(port: int, seconds: float, tokens: int) -> tuple[list[Outcome], float, float]:
    """(outcomes, when it began on the monotonic clock, share of a core taken)."""
    outcomes: list[Outcome] = []
    connections = Connections(f"http://127.0.0.1:{port}")
    replayer = Replayer(Client(connections), Prompts(_TEXT), Asking("any"), outcomes.append)
    go_first()
    started, cpu = time.perf_counter(), time.process_time()
    await replayer.run(trace(seconds, tokens))
    share = (time.process_time() - cpu) / (time.perf_counter() - started)
    connections.close()
    assert replayer.began is not None
    return outcomes, replayer.began, share


def measure(seconds: float, tokens: int) -> dict[str, float]:
    """One run; milliseconds and cores."""
    with sse_server(tokens, GAP_S) as (port, arrivals):
        outcomes, began, share = uvloop.run(play(port, seconds, tokens))
        reached = arrivals()
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed or len(outcomes) != int(RATE * seconds):
        raise RuntimeError(f"{len(failed)} of {len(outcomes)} requests failed: {failed[:1]}")
    off = 1e3 * np.array([reached[outcome.request_id] - began - outcome.due_s for outcome in outcomes])
    late = 1e3 * np.array([outcome.late_s for outcome in outcomes], float)
    found = {
        "tokens": tokens, "requests": len(outcomes), "cores": share,
        **{f"reached_p{p}_ms": float(np.percentile(off, p)) for p in (50, 99, 100)},
        **{f"sent_p{p}_ms": float(np.percentile(late, p)) for p in (50, 99, 100)},
    }  # fmt: skip
    print(
        f"{RATE:.0f} requests/s, answers of {tokens} tokens: reached the server {found['reached_p50_ms']:.2f} ms after "
        f"their time (p50), {found['reached_p99_ms']:.2f} (p99), {found['reached_p100_ms']:.1f} (worst); handed to the "
        f"socket {found['sent_p99_ms']:.2f} (p99); {share:.2f} of a core, {RATE * tokens:.0f} tokens/s",
        flush=True,
    )
    return found


def main() -> None:
    """Measure, print and keep the figures."""
    opts = options(__doc__ or "")
    seconds = 10.0 if opts.quick else 40.0
    runs = [measure(seconds, tokens) for tokens in (16, 64)]
    found = runs[0]
    finish(
        "replayer",
        {"runs": runs},
        f"{RATE:.0f} requests/s reach the server within {found['reached_p99_ms']:.2f} ms of their time (p99); the "
        f"replayer takes {found['cores']:.2f} of a core ({runs[1]['cores']:.2f} with {RATE * 64:.0f} tokens/s)",
        passed=found["reached_p99_ms"] < BAR_MS and found["cores"] < BAR_CORES,
        check=opts.check,
    )


if __name__ == "__main__":
    main()
