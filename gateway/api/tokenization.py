"""``/tokenize`` and ``/detokenize``, in vLLM's shapes."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from gateway.api import prompts
from gateway.api.errors import invalid
from gateway.api.requests import Body, ChatRequest, Message
from gateway.api.served_model import ServedModel


class TokenizeRequest(Body):
    """A text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    """Frame the text (BOS, say); by default prompts are, conversations are not: their template does it."""
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class Tokenized(BaseModel):
    """The tokens of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[int]


class Detokenized(BaseModel):
    """Their text, special tokens included."""

    prompt: str


def tokenization_routes(model: ServedModel, router: APIRouter) -> None:
    """Add both endpoints to `router`."""

    @router.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Tokenized:
        """The tokens of a prompt, or of a conversation as the model sees it."""
        model.check_name(body.model)
        ids = await _ids(body, model)
        strings = [model.tokenizer.token(token) for token in ids] if body.return_token_strs else None
        return Tokenized(count=len(ids), max_model_len=model.context_length, tokens=ids, token_strs=strings)

    @router.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Detokenized:
        """The text of token ids."""
        model.check_name(body.model)
        ids = prompts.check_vocabulary(body.tokens, model, "tokens")
        return Detokenized(prompt=await asyncio.to_thread(model.tokenizer.decode, ids, skip_special=False))


async def _ids(body: TokenizeRequest, model: ServedModel) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "Give one of `prompt` and `messages`.")
    if body.messages is not None:
        chat = ChatRequest(
            messages=body.messages,
            add_generation_prompt=body.add_generation_prompt,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        return await prompts.of_chat(chat, model, special=body.add_special_tokens is True)
    text, special = body.prompt or "", body.add_special_tokens is not False
    try:
        return await asyncio.to_thread(model.tokenizer.encode, text, special=special)
    except ValueError as error:
        raise invalid("prompt", f"`prompt` can't be tokenized: {error}.") from error
