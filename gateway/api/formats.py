"""How the two endpoints write the same pieces of text.

An api process writes a chunk for every token of every stream, so chunks are pieced together from JSON that is ready;
`ChatChunk` and `Completion` (`gateway.api.responses`) say what they look like.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

import msgspec
from pydantic import BaseModel

from gateway.api import logprobs
from gateway.api.job import Job
from gateway.api.responses import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    Usage,
)
from gateway.api.text import Piece, ScoredToken

_json = msgspec.json.Encoder().encode


class CompletionFormat:
    """``text_completion`` objects."""

    def __init__(self, job: Job) -> None:
        self._id, self._model, self._created = job.id, job.model.name, int(time.time())
        self._scores, self._tokens = job.scores, job.model.token_bytes
        self._frame = ChunkFrame(self._id, "text_completion", self._created, self._model, job)

    def chunk(self, choice: int, piece: Piece, usage: Usage | None) -> bytes:
        """A stream's chunk with the next piece of a choice."""
        content = b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}'
        told = _model(self._logprobs(piece.scored))
        return self._frame.around(content % (choice, _json(piece.text), told, _json(piece.finish_reason)), usage)

    def last_chunk(self, usage: Usage) -> bytes:
        """The chunk without choices that ends a stream with its usage."""
        return self._frame.around(b"", usage)

    def whole(self, texts: list[str], reasons: list[str], scored: list[list[ScoredToken]], usage: Usage) -> Completion:
        """The answer in one."""
        choices = [
            CompletionChoice(
                index=index, text=text, logprobs=self._logprobs(tokens), finish_reason=cast(FinishReason, reason)
            )
            for index, (text, reason, tokens) in enumerate(zip(texts, reasons, scored, strict=True))
        ]
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, scored: Sequence[ScoredToken]) -> CompletionLogprobs | None:
        return logprobs.of_completion(scored, self._tokens) if self._scores else None


class ChatFormat:
    """``chat.completion`` objects and their chunks."""

    def __init__(self, job: Job) -> None:
        self._id, self._model, self._created = job.id, job.model.name, int(time.time())
        self._scores, self._tokens = job.scores, job.model.token_bytes
        self._frame = ChunkFrame(self._id, "chat.completion.chunk", self._created, self._model, job)
        self._begun: set[int] = set()

    def chunk(self, choice: int, piece: Piece, usage: Usage | None) -> bytes:
        """A stream's chunk with the next piece of a choice; the choice's first one says whose turn it is."""
        if choice not in self._begun:
            self._begun.add(choice)
            delta = b'{"role":"assistant","content":%b}' % _json(piece.text)
        else:
            delta = b'{"content":%b}' % _json(piece.text) if piece.text else b"{}"
        content = b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}'
        told = _model(self._logprobs(piece.scored))
        return self._frame.around(content % (choice, delta, told, _json(piece.finish_reason)), usage)

    def last_chunk(self, usage: Usage) -> bytes:
        """The chunk without choices that ends a stream with its usage."""
        return self._frame.around(b"", usage)

    def whole(
        self, texts: list[str], reasons: list[str], scored: list[list[ScoredToken]], usage: Usage
    ) -> ChatCompletion:
        """The answer in one."""
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(role="assistant", content=text),
                logprobs=self._logprobs(tokens),
                finish_reason=cast(FinishReason, reason),
            )
            for index, (text, reason, tokens) in enumerate(zip(texts, reasons, scored, strict=True))
        ]
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, scored: Sequence[ScoredToken]) -> ChatLogprobs | None:
        return logprobs.of_chat(scored, self._tokens) if self._scores else None


class ChunkFrame:
    """What all chunks of a stream have in common."""

    def __init__(self, id: str, kind: str, created: int, model: str, job: Job) -> None:
        said = {"id": id, "object": kind, "created": created, "model": model}
        self._head = _json(said)[:-1] + b',"choices":['
        self._says_usage = job.include_usage or job.continuous_usage

    def around(self, choice: bytes, usage: Usage | None) -> bytes:
        """The chunk with one choice, or none where `choice` is empty."""
        if not self._says_usage:
            return b"%b%b]}" % (self._head, choice)
        return b'%b%b],"usage":%b}' % (self._head, choice, _model(usage))


def _model(model: BaseModel | None) -> bytes:
    return b"null" if model is None else model.model_dump_json().encode()
