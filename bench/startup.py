"""From typing `evermoe serve` to the first streamed token, and when each expert replica was ready.

Bar: 15 s on 2 cores, with a cold store cache.   python -m bench.startup
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from bench.report import finish, options
from bench.service import serving

BAR_S = 15.0


def main() -> None:
    """Start the service one or three times."""
    opts = options(__doc__ or "")
    runs = [_start() for _ in range(1 if opts.quick else 3)]
    first = statistics.median(run["first_token_s"] for run in runs)
    figure = f"startup: first streamed token after {first:.1f} s (bar {BAR_S:.0f} s), median of {len(runs)}"
    finish("startup", {"runs": runs}, figure, passed=first <= BAR_S, check=opts.check)


def _start() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as cache, serving([], Path(cache)) as service:
        first = service.first_token()
        seen: dict[str, float] = {}
        while not service.replicas_ready(seen):
            time.sleep(0.2)
        ready = sorted(seen.values())
        print(f"first token {first:.1f} s; replicas ready at {', '.join(f'{seconds:.1f}' for seconds in ready)} s")
        return {"first_token_s": first, **{f"replica_{n}_s": seconds for n, seconds in enumerate(ready)}}


if __name__ == "__main__":
    main()
