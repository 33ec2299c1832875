"""A validated request: the sequences a gateway is asked for, and what becomes of their tokens."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass

import msgspec

from gateway.api import prompts
from gateway.api.errors import ApiError, invalid
from gateway.api.requests import ChatRequest, CompletionRequest, SamplingRequest
from gateway.api.served_model import ServedModel
from gateway.api.text import SequenceText
from gateway.messages import SamplingParams, Submit

_COMPLETION_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Job:
    """Prompts x n sequences; choice ``i`` is the answer ``i % n`` to prompt ``i // n``."""

    id: str
    model: ServedModel
    prompts: list[list[int]]
    params: list[SamplingParams]
    """One for each prompt: room for the answer depends on the prompt's length."""
    n: int
    stops: tuple[str, ...]
    skip_special: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool

    @property
    def choices(self) -> int:
        """Sequences in all."""
        return len(self.prompts) * self.n

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once."""
        return sum(map(len, self.prompts))

    def submit(self, choice: int) -> Submit:
        """The sequence of a choice; the seed differs between the answers to one prompt."""
        prompt, answer = divmod(choice, self.n)
        params = self.params[prompt]
        if params.seed is not None:
            params = msgspec.structs.replace(params, seed=_wrap(params.seed + answer))
        return Submit(request_id=f"{self.id}-{choice}", prompt_token_ids=self.prompts[prompt], params=params)

    def text(self) -> SequenceText:
        """The text of one of the sequences, still empty."""
        tokenizer, skip = self.model.tokenizer, self.skip_special
        return SequenceText(lambda ids: tokenizer.decode(ids, skip_special=skip), self.stops, self.params[0].min_tokens)


async def completion_job(body: CompletionRequest, model: ServedModel) -> Job:
    """Check and tokenize a completion request; raise ApiError."""
    ids = await prompts.of_completion(body, model)
    return _job("cmpl", body, model, ids, "prompt", body.max_tokens, _COMPLETION_TOKENS)


async def chat_job(body: ChatRequest, model: ServedModel) -> Job:
    """Check, render and tokenize a chat request; raise ApiError."""
    ids = await prompts.of_chat(body, model)
    return _job("chatcmpl", body, model, [ids], "messages", body.max_completion_tokens or body.max_tokens, None)


def _job(
    kind: str,
    body: SamplingRequest,
    model: ServedModel,
    ids: list[list[int]],
    param: str,
    max_tokens: int | None,
    default_tokens: int | None,
) -> Job:
    options = body.stream_options
    if options is not None and not body.stream:
        raise invalid("stream_options", "`stream_options` is only allowed with `stream: true`.")
    rooms = [_room(len(prompt), max_tokens, default_tokens, model, param) for prompt in ids]
    return Job(
        id=f"{kind}-{uuid.uuid4().hex}",
        model=model,
        prompts=ids,
        params=[_params(body, model, room) for room in rooms],
        n=body.n or 1,
        stops=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        skip_special=body.skip_special_tokens is not False,
        stream=bool(body.stream),
        include_usage=bool(options and options.include_usage),
        continuous_usage=bool(options and options.continuous_usage_stats),
    )


def _room(prompt: int, asked: int | None, default: int | None, model: ServedModel, param: str) -> int:
    """Tokens the answer may have; raise ApiError where the context is too short for it."""
    limit = model.context_length
    free = limit - prompt
    if free < 1 or (asked is not None and asked > free):
        parts = f"{prompt} in the {'messages' if param == 'messages' else 'prompt'}, {asked or 1} in the completion"
        raise ApiError(
            400,
            f"This model's maximum context length is {limit} tokens. However, you requested {prompt + (asked or 1)} "
            f"tokens ({parts}). Please reduce the length of the {param} or completion.",
            param=param,
            code="context_length_exceeded",
        )
    return min(asked or default or free, free)


def _params(body: SamplingRequest, model: ServedModel, room: int) -> SamplingParams:
    defaults = model.defaults
    min_tokens = body.min_tokens or 0
    if min_tokens > room:
        raise invalid("min_tokens", f"`min_tokens` ({min_tokens}) is more than the answer may have ({room}).")
    stops = prompts.check_vocabulary(body.stop_token_ids or [], model, "stop_token_ids")
    eos = () if body.ignore_eos else model.eos_token_ids
    top_k = defaults.top_k if body.top_k is None else max(body.top_k, 0)
    return SamplingParams(
        max_tokens=room,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        top_k=top_k,
        # Drawn here and not by the gateway: a sequence that moves to another gateway must go on alike.
        seed=secrets.randbits(63) if body.seed is None else body.seed,
        stop_token_ids=tuple(dict.fromkeys((*stops, *eos))),
        min_tokens=min_tokens,
    )


def _wrap(seed: int) -> int:
    """`seed` in 64 signed bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
