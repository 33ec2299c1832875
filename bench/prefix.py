"""Prefix caching: time to the first token of prompts that share a long prefix, against prompts that share none.

Bar: at least 5 times sooner.   python -m bench.prefix
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench import models
from bench.report import finish, options
from bench.service import Service, serving

BAR = 5.0
PREFIX, TAIL, REQUESTS = 512, 16, 32
VOCABULARY = 4096
POLICY = "experts: {replicas: 0}"  # no replicas that start meanwhile: what is compared is the gateway's own work


def main() -> None:
    """Ask in turn with the shared prefix and with fresh ones; then with each all at once."""
    opts = options(__doc__ or "")
    rounds = 8 if opts.quick else REQUESTS - 1
    with tempfile.TemporaryDirectory() as name:
        policy = Path(name, "policy.yaml")
        policy.write_text(POLICY)
        with serving([str(models.mid()), "--policy", str(policy)], Path(name, "cache")) as service:
            service.first_token()
            raw = _measure(service, rounds)
    cold, warm = statistics.median(raw["cold_s"]), statistics.median(raw["warm_s"])
    for kind in ("cold", "warm"):
        print(f"all {rounds} at once, {kind}: {1000 * statistics.median(raw[f'{kind}_burst_s']):.0f} ms")
    figure = (
        f"prefix: first token after {1000 * warm:.1f} ms with {PREFIX} tokens shared, {1000 * cold:.1f} ms without: "
        f"{cold / warm:.1f}x (bar {BAR:.0f}x), median of {rounds}"
    )
    finish("prefix", dict(raw), figure, passed=cold / warm >= BAR, check=opts.check)


def _measure(service: Service, rounds: int) -> dict[str, list[float]]:
    """Seconds to each request's first token."""
    draw = random.Random(0)
    shared = _tokens(draw, PREFIX)
    for _ in range(3):
        _first_token(service, _tokens(draw, PREFIX + TAIL))
    first = _first_token(service, shared + _tokens(draw, TAIL))
    print(f"the first with the shared prefix: {1000 * first:.0f} ms")
    seconds: dict[str, list[float]] = {"cold_s": [], "warm_s": []}
    for _ in range(rounds):
        seconds["cold_s"].append(_first_token(service, _tokens(draw, PREFIX + TAIL)))
        seconds["warm_s"].append(_first_token(service, shared + _tokens(draw, TAIL)))
    bursts = {
        "cold_burst_s": [_tokens(draw, PREFIX + TAIL) for _ in range(rounds)],
        "warm_burst_s": [shared + _tokens(draw, TAIL) for _ in range(rounds)],
    }
    with ThreadPoolExecutor(rounds) as threads:
        for name, prompts in bursts.items():
            seconds[name] = list(threads.map(lambda prompt: _first_token(service, prompt), prompts))
    return seconds


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(16, VOCABULARY) for _ in range(count)]


def _first_token(service: Service, prompt: list[int]) -> float:
    """Seconds until the stream's first chunk; the rest is read, so that the next request meets an idle gateway."""
    start = time.perf_counter()
    chunks = service.stream(prompt, max_tokens=4)
    next(chunks)
    seconds = time.perf_counter() - start
    for _ in chunks:
        pass
    return seconds


if __name__ == "__main__":
    main()
