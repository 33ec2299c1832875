"""Typed messages between the api process and a gateway: the contract of the two rooms' only conversation.

Everything on that connection is one of these structs, encoded with MessagePack (no pickle).
"""

from __future__ import annotations

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the next tokens of one sequence are chosen."""

    max_tokens: int
    """Tokens to emit at most; at least 1."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    seed: int | None = None
    """Same seed, same text, whatever else is in the batch. None: the gateway draws one."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the sequence (finish reason ``stop``); the stopping token itself is emitted."""
    min_tokens: int = 0
    """No stop token is sampled before this many tokens."""


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Start a sequence; ``emitted`` are tokens a client already has (after the loss of a gateway).

    They count towards ``max_tokens`` and ``min_tokens`` and as positions of seeded sampling; no delta repeats them.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    emitted: list[int] = []
    priority: int = 0
    """Lower ones are served first."""
    deadline_s: float | None = None
    """Seconds after which it is given up, running or waiting."""


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Stop a sequence and free what it holds; unknown ids are ignored (it may just have finished)."""

    request_id: str


class Timings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Seconds a sequence waited, then took to its first token, then to its end."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


class Delta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step added to one sequence."""

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    """``stop``, ``length`` or ``error``; None while the sequence runs."""
    stop_token: bool = False
    """The last of ``token_ids`` is a stop token: not part of the text."""
    error: str | None = None
    """With finish reason ``error``: one sentence for the client."""
    error_status: int = 500
    """With finish reason ``error``, in HTTP's terms: 400 the request can never run, 429 the queue is full,
    500 the gateway failed, 504 the deadline passed."""
    retry_after_s: float | None = None
    """With status 429: seconds until the present queue will have been served."""
    cached_tokens: int = 0
    """In a sequence's first delta with a token: prompt tokens whose keys and values were cached already."""
    timings: Timings | None = None
    """In the last delta of a sequence that the engine took in."""


class StepOutput(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """All deltas one engine step has for one api process."""

    deltas: list[Delta]


class StatusQuery(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Ask a gateway for its status."""

    query_id: int


class GatewayStatus(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A gateway's counters (see `gateway.engine` and `gateway.dispatch`)."""

    query_id: int
    gateway: str
    """The gateway's id in the directory."""
    running: int
    waiting: int
    kv_blocks_used: int
    """Blocks of running sequences; what is only kept for others to find does not count."""
    kv_blocks_total: int
    expert_calls: dict[str, dict[str, int]]
    """Expert unit -> path (``replica``, ``inline``, ``retry``, ``hedge``) -> calls."""
    preemptions: int = 0
    prefix_cache_queries: int = 0
    """Tokens that were looked for in the cache, and of these ``prefix_cache_hits`` were found."""
    prefix_cache_hits: int = 0


ToGateway = Submit | Cancel | StatusQuery
FromGateway = StepOutput | GatewayStatus
