"""How the two endpoints write the same pieces of text."""

from __future__ import annotations

import time
from typing import cast

from gateway.api.job import Job
from gateway.api.responses import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    Completion,
    CompletionChoice,
    FinishReason,
    Usage,
)
from gateway.api.text import Piece


class CompletionFormat:
    """``text_completion`` objects."""

    def __init__(self, job: Job) -> None:
        self._id, self._model, self._created = job.id, job.model.name, int(time.time())
        self._says_usage = job.include_usage or job.continuous_usage

    def chunk(self, choice: int, piece: Piece, usage: Usage | None) -> bytes:
        """A stream's chunk with the next piece of a choice."""
        return self._chunk([_text_choice(choice, piece.text, piece.finish_reason)], usage)

    def last_chunk(self, usage: Usage) -> bytes:
        """The chunk without choices that ends a stream with its usage."""
        return self._chunk([], usage)

    def whole(self, texts: list[str], reasons: list[str], usage: Usage) -> Completion:
        """The answer in one."""
        answers = enumerate(zip(texts, reasons, strict=True))
        return self._answer([_text_choice(index, text, reason) for index, (text, reason) in answers], usage)

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
        self._begun: set[int] = set()

    def chunk(self, choice: int, piece: Piece, usage: Usage | None) -> bytes:
        """A stream's chunk with the next piece of a choice; the choice's first one says whose turn it is."""
        delta = ChatDelta(content=piece.text) if piece.text else ChatDelta()
        if choice not in self._begun:
            self._begun.add(choice)
            delta = ChatDelta(role="assistant", content=piece.text)
        reason = cast(FinishReason | None, piece.finish_reason)
        return self._chunk([ChatChunkChoice(index=choice, delta=delta, logprobs=None, finish_reason=reason)], usage)

    def last_chunk(self, usage: Usage) -> bytes:
        """The chunk without choices that ends a stream with its usage."""
        return self._chunk([], usage)

    def whole(self, texts: list[str], reasons: list[str], usage: Usage) -> ChatCompletion:
        """The answer in one."""
        choices = [
            ChatChoice(
                index=index,
                message=ChatMessage(role="assistant", content=text),
                finish_reason=cast(FinishReason, reason),
            )
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
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


def _text_choice(index: int, text: str, reason: str | None) -> CompletionChoice:
    return CompletionChoice(index=index, text=text, logprobs=None, finish_reason=cast(FinishReason | None, reason))
