"""Typed messages between the api process and a gateway: the contract of the two rooms' only conversation.

Everything on that connection is one of these structs, encoded with MessagePack (no pickle).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
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
    """No stop token is sampled before this many tokens: the first possible one is the token after them."""
    min_p: float = 0.0
    """Only tokens at least this probable, relative to the best one; 0 keeps every token."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token generated so far (OpenAI's definition)."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time it was generated (OpenAI's definition)."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or answer (CTRL, arXiv 1909.05858)."""
    logit_bias: dict[int, float] | None = None
    """Token id -> what is added to its logit."""
    logprobs: int | None = None
    """Tell the log-probability of each token and of this many best alternatives; None tells nothing."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, all but the first."""
    grammar: str | None = None
    """The text keeps to this grammar, in llguidance's serialised form (see `gateway.grammar`)."""


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of N consecutive tokens, each with its K best alternatives; little-endian arrays.

    They are the model's own: before temperature, penalties and whatever else changes the choice.
    """

    chosen: bytes
    """float32 [N]: of the tokens themselves"""
    best_ids: bytes = b""
    """int32 [N, K]: the most likely tokens, in falling order"""
    best: bytes = b""
    """float32 [N, K]: theirs"""

    def rows(self) -> list[tuple[float, list[tuple[int, float]]]]:
        """For each token its own log-probability, and its best alternatives as (token id, log-probability)."""
        chosen, ids, best = array("f", self.chosen), array("i", self.best_ids), array("f", self.best)
        width = len(ids) // (len(chosen) or 1)
        pairs = list(zip(ids, best, strict=True))
        return [(own, pairs[i * width : (i + 1) * width]) for i, own in enumerate(chosen)]

    def split(self) -> list[Logprobs]:
        """One for each token."""
        count = len(self.chosen) // 4
        width = len(self.best) // (count or 1)
        cut = [slice(i * width, (i + 1) * width) for i in range(count)]
        return [Logprobs(self.chosen[4 * i : 4 * i + 4], self.best_ids[at], self.best[at]) for i, at in enumerate(cut)]

    @classmethod
    def join(cls, parts: Iterable[Logprobs]) -> Logprobs:
        """The tokens of `parts`, all of one width, in order."""
        chosen, ids, best = zip(*((part.chosen, part.best_ids, part.best) for part in parts), strict=True)
        return cls(b"".join(chosen), b"".join(ids), b"".join(best))


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
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
    cap_max_tokens: bool = False
    """``max_tokens`` is only an upper bound: the engine lowers it to what its cache holds, and refuses nothing."""


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
    logprobs: Logprobs | None = None
    """Of `token_ids`, where they were asked for."""
    prompt_logprobs: Logprobs | None = None
    """Of the prompt's tokens from the second on; with a sequence's first token, where they were asked for."""


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
    steps: int = 0
    """Steps of the engine since its start."""
    step_seconds: dict[str, float] = {}
    """What they spent by phase (see `gateway.step_times`)."""
    layer_counts: list[int] = []
    """MoE layers by how long they took (see `gateway.layer_times`), all layers together ..."""
    layer_seconds: float = 0.0
    """... and the sum."""
    policy_version: int = 0
    """Of the policy it goes by (see `placement.policy.published`)."""
    compiled_layers: int = 0
    """Decoder layers that run compiled."""
    load_steps_dropped: int = 0
    """Steps whose routing nobody took in time: the predictor did not hear of them."""
    inline_rows: int = 0
    """Rows of experts that the gateway computed itself, and the bytes of expert weights it holds for that."""
    inline_bytes: int = 0
    preemptions: int = 0
    prefix_cache_queries: int = 0
    """Tokens that were looked for in the cache, and of these ``prefix_cache_hits`` were found."""
    prefix_cache_hits: int = 0


class Alive(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The gateway's process is there, with or without anything to say."""


ToGateway = Submit | Cancel | StatusQuery
FromGateway = StepOutput | GatewayStatus | Alive
