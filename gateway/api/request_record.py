"""What is kept of one HTTP request for the log and the metrics: never a word of its prompt or its answer."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

from starlette.types import Scope


@dataclass(kw_only=True)
class RequestRecord:
    """One request; times are seconds, those of sequences the longest among them."""

    id: str
    method: str
    started: float = field(default_factory=time.perf_counter)
    route: str | None = None
    """The route's pattern, not what stood in the URL; None where no route fits."""
    status: int = 0
    """0: the client left before there was one."""
    error: str | None = None
    """The error's code."""
    key: str | None = None
    """The name of its API key."""
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    finish_reasons: Counter[str] = field(default_factory=Counter)
    first_token_s: float | None = None
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    duration_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    """Goes out with the answer."""

    @classmethod
    def of(cls, scope: Scope) -> RequestRecord:
        """The record of a request under way (see `gateway.api.request_context`)."""
        record: RequestRecord = scope["state"]["record"]
        return record
