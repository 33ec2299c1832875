"""Log-probabilities of tokens: the model's own, before anything changed the choice."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from gateway.messages import Logprobs

_AT_ONCE = 64
"""Rows of a prompt that are normalised at a time: a copy of all, in full precision, may be large."""


class PromptLogprobs:
    """Collects those of one prompt while it is computed, chunk by chunk."""

    def __init__(self, best: int, prompt_length: int) -> None:
        self._best = best
        self._prompt_length = prompt_length
        self._parts: list[Logprobs] = []
        self.rows = 0
        """Leading positions that are done: the row at position ``p`` tells of the token at ``p + 1``."""

    def missing(self, start: int, count: int) -> range:
        """Which of the positions ``start .. start + count`` are still wanted, when these are computed."""
        return range(max(start, self.rows), min(start + count, self._prompt_length - 1))

    def add(self, logits: torch.Tensor, tokens: list[int]) -> None:
        """Take the rows at the next positions, `logits` [N, vocabulary]; `tokens` are the whole sequence's."""
        for at in range(0, len(logits), _AT_ONCE):
            part = logits[at : at + _AT_ONCE]
            wanted = tokens[self.rows + 1 : self.rows + 1 + len(part)]
            self._parts.append(logprobs(part, wanted, [self._best] * len(wanted), together=True)[0])
            self.rows += len(wanted)

    def result(self) -> Logprobs:
        """All that was collected."""
        return Logprobs.join(self._parts) if self._parts else Logprobs(b"")


@torch.inference_mode()
def logprobs(logits: torch.Tensor, tokens: list[int], best: Seq[int], *, together: bool = False) -> list[Logprobs]:
    """Those of `tokens` [N] under `logits` [N, vocabulary], each with its `best` most likely alternatives.

    One for each token; `together`, which needs one width for all, one for all of them.
    """
    scores = logits.float().log_softmax(dim=-1)
    chosen = scores.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    width = min(max(best), logits.shape[-1])
    values, ids = scores.topk(width, dim=-1)
    own, top, top_ids = chosen.cpu().numpy(), values.cpu().numpy(), ids.int().cpu().numpy()
    if together:
        return [Logprobs(own.tobytes(), top_ids.tobytes(), top.tobytes())]
    return [Logprobs(own[i].tobytes(), top_ids[i, :k].tobytes(), top[i, :k].tobytes()) for i, k in enumerate(best)]
