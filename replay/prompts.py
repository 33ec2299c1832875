"""Prompts of the lengths a trace tells, cut from real text: token ids where the server takes them, else text.

What a trace says two prompts share, they share: a block with the same id and kind of text is the same text in every
prompt. Everything follows from the trace and a seed, whatever order the prompts are made in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from replay.trace import BLOCK_TOKENS, TraceRequest

Stream = npt.NDArray[np.int32] | str
"""A long text of one kind, as token ids or as it is"""


@dataclass(frozen=True)
class Prompts:
    """Makes prompts from `streams`, one for each kind of text; all of them token ids, or all of them text."""

    streams: Mapping[str, Stream]
    units_per_token: Mapping[str, float] | None = None
    """How much of each stream one token is: None for token ids, for text its characters per token"""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.streams or not all(len(stream) for stream in self.streams.values()):
            raise ValueError("prompts can't be made without text")

    def of(self, request: TraceRequest) -> list[int] | str:
        """The prompt of `request`: at least one token long."""
        tokens = max(request.prompt_tokens, 1)
        pieces: list[Stream] = []
        for block in request.hash_ids[: -(-tokens // BLOCK_TOKENS)]:
            length = min(BLOCK_TOKENS, tokens - BLOCK_TOKENS * len(pieces))
            pieces.append(self._piece(f"block {block}", request.kind, length))
        rest = tokens - BLOCK_TOKENS * len(pieces)
        if rest > 0:
            pieces.append(self._piece(f"request {request.index}", request.kind, rest))
        if isinstance(pieces[0], str):
            return "".join(str(piece) for piece in pieces)
        ids: list[int] = np.concatenate([np.asarray(piece) for piece in pieces]).tolist()
        return ids

    def _piece(self, name: str, kind: str, tokens: int) -> Stream:
        """So much text, the same for the same name, and kind where that is one of ours."""
        digest = hashlib.blake2b(f"{self.seed} {kind} {name}".encode(), digest_size=12).digest()
        kinds = sorted(self.streams)
        chosen = kind if kind in self.streams else kinds[int.from_bytes(digest[:4], "little") % len(kinds)]
        stream = self.streams[chosen]
        start = int.from_bytes(digest[4:], "little") % len(stream)
        units = self.units_per_token[chosen] if self.units_per_token is not None else 1.0
        length = max(round(tokens * units), 1)
        piece = stream[start : start + length]
        while len(piece) < length:
            more = stream[: length - len(piece)]
            piece = piece + more if isinstance(piece, str) else np.concatenate([piece, more])  # type: ignore[operator]
        return piece


def fitted(request: TraceRequest, longest: int | None) -> TraceRequest:
    """`request`, or a shorter one where prompt and answer would be longer than `longest` tokens together."""
    if longest is None or request.prompt_tokens + request.answer_tokens <= longest:
        return request
    answer = min(request.answer_tokens, longest // 2)
    return replace(request, prompt_tokens=min(request.prompt_tokens, longest - answer), answer_tokens=answer)
