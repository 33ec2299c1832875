"""How the two endpoints write the same pieces of text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

from gateway.api import logprobs
from gateway.api.job import Job
from gateway.api.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    Usage,
)
from gateway.api.text import Piece, ScoredToken


class CompletionFormat:
    """``text_completion`` objects."""

    def __init__(self, job: Job) -> None:
        self._id, self._model, self._created = job.id, job.model.name, int(time.time())
        self._says_usage = job.include_usage or job.continuous_usage
        self._scores, self._tokens = job.scores, job.model.token_bytes

    def chunk(self, choice: int, piece: Piece, usage: Usage | None) -> bytes:
        """A stream's chunk with the next piece of a choice."""
        return self._chunk([self._choice(choice, piece.text, piece.finish_reason, piece.scored)], usage)

    def last_chunk(self, usage: Usage) -> bytes:
        """The chunk without choices that ends a stream with its usage."""
        return self._chunk([], usage)

    def whole(self, texts: list[str], reasons: list[str], scored: list[list[ScoredToken]], usage: Usage) -> Completion:
        """The answer in one."""
        answers = enumerate(zip(texts, reasons, scored, strict=True))
        return self._answer([self._choice(index, *answer) for index, answer in answers], usage)

    def _choice(self, index: int, text: str, reason: str | None, scored: Sequence[ScoredToken]) -> CompletionChoice:
        told = self._logprobs(scored)
        return CompletionChoice(index=index, text=text, logprobs=told, finish_reason=cast(FinishReason | None, reason))

    def _logprobs(self, scored: Sequence[ScoredToken]) -> CompletionLogprobs | None:
        return logprobs.of_completion(scored, self._tokens) if self._scores else None

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None) -> bytes:
        unsaid = None if self._says_usage else {"usage"}
        return self._answer(choices, usage).model_dump_json(exclude=unsaid).encode()

    def _answer(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
        )


class ChatFormat:
    """``chat.completion`` objects and their chunks."""

    def __init__(self, job: Job) -> None:
        self._id, self._model, self._created = job.id, job.model.name, int(time.time())
        self._says_usage = job.include_usage or job.continuous_usage
        self._scores, self._tokens = job.scores, job.model.token_bytes
        self._begun: set[int] = set()

    def chunk(self, choice: int, piece: Piece, usage: Usage | None) -> bytes:
        """A stream's chunk with the next piece of a choice; the choice's first one says whose turn it is."""
        delta = ChatDelta(content=piece.text) if piece.text else ChatDelta()
        if choice not in self._begun:
            self._begun.add(choice)
            delta = ChatDelta(role="assistant", content=piece.text)
        reason = cast(FinishReason | None, piece.finish_reason)
        told = self._logprobs(piece.scored)
        return self._chunk([ChatChunkChoice(index=choice, delta=delta, logprobs=told, finish_reason=reason)], usage)

    def last_chunk(self, usage: Usage) -> bytes:
        """The chunk without choices that ends a stream with its usage."""
        return self._chunk([], usage)

    def _logprobs(self, scored: Sequence[ScoredToken]) -> ChatLogprobs | None:
        return logprobs.of_chat(scored, self._tokens) if self._scores else None

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

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None) -> bytes:
        said = {"usage": usage} if self._says_usage else {}
        chunk = ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=choices,
            **said,
        )
        return chunk.model_dump_json(exclude_unset=True).encode()
