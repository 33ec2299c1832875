"""The scheduler's share of a step: decoding sequences that run while 2,000 wait.

Bar: under 0.3 ms a step for 32 of them.   python -m bench.schedule
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from functools import partial

from bench.report import finish, median_ms, options
from gateway.blocks import BlockPool, extend_keys
from gateway.messages import SamplingParams
from gateway.scheduler import Scheduler
from gateway.sequence import Sequence

WAITING = 2000
BAR_MS = 0.3
PROMPT = list(range(500))


def sequence(number: int) -> Sequence:
    """A request of 500 tokens that has nothing in common with any other, and a deadline."""
    tokens = [number, *PROMPT]
    params = SamplingParams(max_tokens=1000)
    return Sequence(f"{number}", params, tokens, len(tokens), seed=0, priority=number % 3, deadline=1e9 + number)


def busy(running: int) -> Scheduler:
    """A scheduler whose `running` sequences decode while others wait."""
    plan = Scheduler(
        BlockPool(200 * running, 16), token_budget=600 * running, max_sequences=running, max_waiting=WAITING
    )
    for number in range(running + WAITING):
        plan.submit(sequence(number))
    step(plan)
    return plan


def step(plan: Scheduler) -> None:
    """What a step costs beside its model."""
    plan.expired(0.0)
    works = plan.schedule(0.0)
    plan.advance(works)
    for work in works:
        work.sequence.tokens.append(7)


def timed(calls: Iterable[Callable[[], object]]) -> list[float]:
    """Seconds of each of `calls`."""
    seconds = []
    for call in calls:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measure, print and keep the figures."""
    opts = options(__doc__ or "")
    times = 500 if opts.quick else 900
    steps = {running: timed([partial(step, busy(running))] * times) for running in (32, 64, 256)}
    for running, seconds in steps.items():
        worst = 1000 * sorted(seconds)[int(0.99 * times)]
        print(f"{running:4} decode, {WAITING} wait: {median_ms(seconds):.3f} ms a step (99 %: {worst:.3f})")
    plan = busy(64)
    extra = [sequence(10**6 + number) for number in range(times)]
    random.Random(0).shuffle(extra)
    submitted = timed(partial(plan.submit, one) for one in extra)
    cancelled = timed(partial(plan.finish, one) for one in extra)
    hashed = timed(partial(extend_keys, [], PROMPT, len(PROMPT) // 16, 16) for _ in range(times))
    print(
        f"one more waits {1000 * median_ms(submitted):.1f} us, one less {1000 * median_ms(cancelled):.1f} us, ", end=""
    )
    print(f"a block's key {1000 * median_ms(hashed) / (len(PROMPT) // 16):.2f} us")
    figure = median_ms(steps[32])
    raw = {"ms": {str(running): median_ms(seconds) for running, seconds in steps.items()}}
    text = f"scheduling 32 decoding sequences takes {figure:.3f} ms a step (bar: {BAR_MS} ms)"
    finish("schedule", raw, text, passed=figure < BAR_MS, check=opts.check)


if __name__ == "__main__":
    main()
