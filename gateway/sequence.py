"""One request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.messages import SamplingParams
from gateway.sampling_state import SamplingState


@dataclass(eq=False, slots=True)
class Sequence:
    """The tokens of one request, and how many of them already have their keys and values in the cache."""

    request_id: str
    params: SamplingParams
    tokens: list[int]
    """Prompt, then everything generated."""
    prompt_length: int
    seed: int
    computed: int = 0
    """Leading tokens whose keys and values are cached."""
    blocks: list[int] = field(default_factory=list)
    """Cache blocks in order: token ``i`` lives in ``blocks[i // block_size]``."""
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
