"""A validated request: the sequences a gateway is asked for, and what becomes of their tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from gateway.api import prompts, response_format
from gateway.api.echo import EchoedText
from gateway.api.errors import ApiError, invalid
from gateway.api.requests import ChatRequest, CompletionRequest, SamplingRequest
from gateway.api.scored_text import ScoredText
from gateway.api.served_model import ServedModel
from gateway.api.text import SequenceText, Text
from gateway.messages import SamplingParams, Submit

_COMPLETION_TOKENS = 16
_MAX_SCORES = 500_000
"""Log-probabilities of one echoed prompt."""


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
    caps: bool
    """The answers may be as long as fits: nobody asked for a length."""
    echoes: list[str] | None
    """What each answer begins with: its prompt's text."""
    generates: bool
    """False: the prompt is all that is wanted."""
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
        return Submit(
            request_id=f"{self.id}-{choice}",
            prompt_token_ids=self.prompts[prompt],
            params=params,
            cap_max_tokens=self.caps,
        )

    @property
    def scores(self) -> bool:
        """Whether tokens come with their log-probabilities."""
        return self.params[0].logprobs is not None

    def text(self, choice: int) -> Text:
        """The text of a choice, still empty."""
        prompt = choice // self.n
        echo = None if self.echoes is None else self.echoes[prompt]
        plain = SequenceText(self._decode, self.stops, self.params[prompt].min_tokens)
        text: Text = ScoredText(plain, len(echo or "")) if self.scores else plain
        if echo is None:
            return text
        return EchoedText(text, echo, self.prompts[prompt], self._decode, alone=not self.generates)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.model.tokenizer.decode(ids, skip_special=self.skip_special)


async def completion_job(body: CompletionRequest, model: ServedModel) -> Job:
    """Check and tokenize a completion request; raise ApiError."""
    _check_completion(body)
    ids = await prompts.of_completion(body, model)
    _check_scores(body, ids)
    wishes = await _wishes(body, model, body.logprobs, echo=bool(body.echo))
    job = _job("cmpl", body, model, ids, "prompt", _asked(body), _COMPLETION_TOKENS, wishes)
    if not body.echo:
        return job
    echoes = prompts.texts(body, ids, model, skip_special=job.skip_special)
    return dataclasses.replace(job, echoes=echoes, generates=body.max_tokens != 0)


async def chat_job(body: ChatRequest, model: ServedModel) -> Job:
    """Check, render and tokenize a chat request; raise ApiError."""
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "`top_logprobs` is only allowed with `logprobs: true`.")
    ids = await prompts.of_chat(body, model)
    wishes = await _wishes(body, model, (body.top_logprobs or 0) if body.logprobs else None)
    asked = body.max_completion_tokens or body.max_tokens
    return _job("chatcmpl", body, model, [ids], "messages", asked, None, wishes)


def _check_completion(body: CompletionRequest) -> None:
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens", "`max_tokens` must be at least 1; 0 is only allowed with `echo: true`.")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid(
            "best_of", "`best_of` is not supported by this server, unless it is `n`.", "unsupported_parameter"
        )


def _check_scores(body: CompletionRequest, prompts: list[list[int]]) -> None:
    """A prompt's scores come in one message from the gateway."""
    asked = max(map(len, prompts)) * ((body.logprobs or 0) + 1)
    if body.echo and body.logprobs is not None and asked > _MAX_SCORES:
        raise invalid("logprobs", f"`logprobs` of so long a prompt are too many ({asked}): at most {_MAX_SCORES}.")


def _asked(body: CompletionRequest) -> int | None:
    """The length that is asked for. Without any the gateway still makes a token: it comes with the prompt's scores."""
    return 1 if body.max_tokens == 0 else body.max_tokens


async def _wishes(
    body: SamplingRequest, model: ServedModel, logprobs: int | None, *, echo: bool = False
) -> SamplingParams:
    """What all sequences of a request have in common of their parameters, but for those that depend on prompts."""
    if logprobs is not None:
        await asyncio.to_thread(model.token_bytes.load)
    return SamplingParams(
        max_tokens=1,
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_bias(body.logit_bias, model),
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo else None,
        grammar=await response_format.grammar_of(body.response_format),
    )


def _bias(bias: dict[str, float] | None, model: ServedModel) -> dict[int, float] | None:
    if not bias:
        return None
    wrong = next((key for key in bias if not re.fullmatch("[0-9]{1,10}", key)), None)
    if wrong is not None:
        raise invalid("logit_bias", f"`logit_bias` has the key {wrong[:50]!r}: keys are token ids.")
    prompts.check_vocabulary(list(map(int, bias)), model, "logit_bias")
    return {int(token): value for token, value in bias.items()}


def _job(
    kind: str,
    body: SamplingRequest,
    model: ServedModel,
    ids: list[list[int]],
    param: str,
    max_tokens: int | None,
    default_tokens: int | None,
    wishes: SamplingParams,
) -> Job:
    options = body.stream_options
    if options is not None and not body.stream:
        raise invalid("stream_options", "`stream_options` is only allowed with `stream: true`.")
    rooms = [_room(len(prompt), max_tokens, default_tokens, model, param) for prompt in ids]
    return Job(
        id=f"{kind}-{uuid.uuid4().hex}",
        model=model,
        prompts=ids,
        params=[_params(body, model, room, wishes) for room in rooms],
        n=body.n or 1,
        stops=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        skip_special=body.skip_special_tokens is not False,
        caps=max_tokens is None,
        echoes=None,
        generates=True,
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


def _params(body: SamplingRequest, model: ServedModel, room: int, wishes: SamplingParams) -> SamplingParams:
    defaults = model.defaults
    min_tokens = body.min_tokens or 0
    if min_tokens > room:
        raise invalid("min_tokens", f"`min_tokens` ({min_tokens}) is more than the answer may have ({room}).")
    stops = prompts.check_vocabulary(body.stop_token_ids or [], model, "stop_token_ids")
    eos = () if body.ignore_eos else model.eos_token_ids
    top_k = defaults.top_k if body.top_k is None else max(body.top_k, 0)
    return msgspec.structs.replace(
        wishes,
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
