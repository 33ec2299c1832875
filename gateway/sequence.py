"""One request on its way through the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gateway.messages import SamplingParams, Timings
from gateway.sampling_state import SamplingState


@dataclass(eq=False, slots=True)
class Sequence:
    """The tokens of one request, and how many of them already have their keys and values in the cache.

    Times are seconds of the engine's clock.
    """

    request_id: str
    params: SamplingParams
    tokens: list[int]
    """Prompt, then everything generated."""
    prompt_length: int
    seed: int
    priority: int = 0
    """Lower ones first."""
    deadline: float = math.inf
    """When it is given up."""
    submitted_at: float = 0.0
    started_at: float | None = None
    """When it first got a place in the batch."""
    answered_at: float | None = None
    """When its first token came."""
    rank: tuple[int, int] = (0, 0)
    """Its place in the order of service, given by the scheduler."""
    computed: int = 0
    """Leading tokens whose keys and values are cached."""
    blocks: list[int] = field(default_factory=list)
    """Cache blocks in order: token ``i`` lives in ``blocks[i // block_size]``."""
    keys: list[bytes] = field(default_factory=list)
    """Keys of its leading blocks, as far as they were needed (see `gateway.blocks.extend_keys`)."""
    published: int = 0
    """Leading blocks that can be found by their keys."""
    cached: int = 0
    """Prompt tokens it found computed when it started."""
    suspect: bool = False
    """It was in a step that went wrong: what its blocks hold is for nobody else."""
    sampling: SamplingState = field(init=False)

    def __post_init__(self) -> None:
        self.sampling = SamplingState(self.params, self.prompt_length, self.generated)

    @property
    def generated(self) -> int:
        """Tokens emitted so far, those of an earlier gateway included."""
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens still to be computed; 1 for a sequence that only decodes."""
        return len(self.tokens) - self.computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt's rows must be computed for their logits' sake, cached or not."""
        return self.sampling.prompt_logprobs is not None

    @property
    def length_limit(self) -> int:
        """Tokens of the finished sequence at most."""
        return self.prompt_length + self.params.max_tokens

    def timings(self, now: float) -> Timings:
        """How long it waited, was prefilled and decoded until `now`."""
        started = now if self.started_at is None else self.started_at
        answered = now if self.answered_at is None else self.answered_at
        return Timings(queue_s=started - self.submitted_at, prefill_s=answered - started, decode_s=now - answered)
