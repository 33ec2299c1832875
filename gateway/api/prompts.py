"""What a request asks the model to go on from, as token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from gateway.api.errors import invalid
from gateway.api.requests import MAX_SEQUENCES, ChatRequest, CompletionRequest, Message
from gateway.api.served_model import ServedModel

_LONG_TEXT = 4096
"""Characters from which a text is tokenized in a thread."""
Result = TypeVar("Result")
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


async def of_completion(body: CompletionRequest, model: ServedModel) -> list[list[int]]:
    """The prompts of a completion request, none of them empty; raise ApiError."""
    prompts = _one_form(body.prompt)
    n = body.n or 1
    if len(prompts) * n > MAX_SEQUENCES:
        raise invalid("prompt", f"{len(prompts)} prompts with n={n}: at most {MAX_SEQUENCES} answers fit one request.")
    special = body.add_special_tokens is not False

    def ids() -> list[list[int]]:
        return [
            _encode(prompt, model, special=special, param="prompt")
            if isinstance(prompt, str)
            else check_vocabulary(prompt, model, "prompt")
            for prompt in prompts
        ]

    return await _beside_the_loop(ids, sum(map(len, prompts)))


def texts(body: CompletionRequest, ids: list[list[int]], model: ServedModel, *, skip_special: bool) -> list[str]:
    """The prompts of a completion request, tokenized to `ids`, as text."""
    given = zip(_one_form(body.prompt), ids, strict=True)
    return [
        prompt if isinstance(prompt, str) else model.tokenizer.decode(tokens, skip_special=skip_special)
        for prompt, tokens in given
    ]


async def of_chat(body: ChatRequest, model: ServedModel, *, special: bool = False) -> list[int]:
    """The conversation through the model's chat template, which frames it unless `special`; raise ApiError."""
    text = _render(body, model)
    return await _beside_the_loop(lambda: _encode(text, model, special=special, param="messages"), len(text))


def check_vocabulary(ids: list[int], model: ServedModel, param: str) -> list[int]:
    """Return `ids`; raise ApiError for one the model does not know."""
    wrong = next((token for token in ids if not 0 <= token < model.vocab_size), None)
    if wrong is not None:
        limit = model.vocab_size - 1
        raise invalid(param, f"`{param}` has token id {wrong}, out of the vocabulary: ids go from 0 to {limit}.")
    return ids


def _one_form(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    """The prompts of a request in one form, whichever of the four it used; raise ApiError for an empty one."""
    if isinstance(prompt, str):
        prompts: Sequence[str | list[int]] = [prompt]
    elif prompt and isinstance(prompt[0], int):
        prompts = [[token for token in prompt if isinstance(token, int)]]
    else:
        prompts = [part for part in prompt if not isinstance(part, int)]
    if not prompts or not all(prompts):
        raise invalid("prompt", "`prompt` is empty: give at least one token.")
    return prompts


async def _beside_the_loop(work: Callable[[], Result], size: int) -> Result:
    """Run `work` on a text of `size` characters: in a thread where it would keep the other requests waiting."""
    return work() if size < _LONG_TEXT else await asyncio.to_thread(work)


def _encode(text: str, model: ServedModel, *, special: bool, param: str) -> list[int]:
    try:
        ids = model.tokenizer.encode(text, special=special)
    except ValueError as error:
        raise invalid(param, f"`{param}` can't be tokenized: {error}.") from error
    if not ids:
        raise invalid(param, f"`{param}` has no tokens: give at least one.")
    return ids


def _render(body: ChatRequest, model: ServedModel) -> str:
    if model.tokenizer.chat is None:
        raise invalid(
            "messages", f"The model `{model.name}` has no chat template: use /v1/completions.", "no_chat_template"
        )
    variables = dict(body.chat_template_kwargs or {})
    for name in _RESERVED:
        if name in variables:
            raise invalid("chat_template_kwargs", f"`chat_template_kwargs` must not set `{name}`.")
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    try:
        return model.tokenizer.chat.render(
            [_plain(message) for message in body.messages],
            add_generation_prompt=body.add_generation_prompt is not False,
            **variables,
        )
    except ValueError as error:
        raise invalid("messages", f"`messages` do not fit the model: {error}.") from error


def _plain(message: Message) -> dict[str, object]:
    """The message as templates know it: its parts joined to one text, as few templates know parts."""
    plain = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        plain["content"] = "\n".join(part.text for part in message.content)
    return plain
