"""One request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.messages import SamplingParams


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

    @property
    def generated(self) -> int:
        """Tokens emitted so far, those of an earlier gateway included."""
        return len(self.tokens) - self.prompt_length

    @property
    def pending(self) -> int:
        """Tokens still to be computed; 1 for a sequence that only decodes."""
        return len(self.tokens) - self.computed

    @property
    def length_limit(self) -> int:
        """Tokens of the finished sequence at most."""
        return self.prompt_length + self.params.max_tokens
