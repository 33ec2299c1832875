"""Whether the engine can run a request at all."""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from gateway.messages import SamplingParams, Submit


class RequestError(ValueError):
    """A request that can never run; the message is for the client."""


def check(request: Submit, *, vocabulary: int, context: int) -> None:
    """Raise RequestError for what a model with so many tokens and so long a context cannot do."""
    prompt, params = request.prompt_token_ids, request.params
    if not prompt:
        raise RequestError("The prompt is empty; it must have at least one token.")
    for what, tokens in (
        ("The prompt", prompt),
        ("The emitted text", request.emitted),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", params.logit_bias or ()),
    ):
        _check_tokens(what, tokens, vocabulary)
    _check_params(params)
    length = len(prompt) + params.max_tokens
    if length > context:
        raise RequestError(
            f"This model's maximum context length is {context} tokens. However, you requested {length} tokens "
            f"({len(prompt)} in the messages, {params.max_tokens} in the completion). "
            "Please reduce the length of the messages or completion."
        )


def capped(request: Submit, cache_tokens: int) -> SamplingParams:
    """The request's parameters, with `max_tokens` lowered to what the cache holds where the request allows that."""
    params = request.params
    room = cache_tokens + 1 - len(request.prompt_token_ids)  # the last token is never computed
    if not request.cap_max_tokens or room < 1 or params.max_tokens <= room:
        return params
    return msgspec.structs.replace(params, max_tokens=room)


def _check_tokens(what: str, tokens: Iterable[int], vocabulary: int) -> None:
    wrong = next((token for token in tokens if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise RequestError(f"{what} has token id {wrong}; the vocabulary is 0 to {vocabulary - 1}.")


def _check_params(params: SamplingParams) -> None:
    bias = (params.logit_bias or {}).values()
    checks = (
        ("max_tokens", params.max_tokens, params.max_tokens >= 1, "at least 1"),
        ("temperature", params.temperature, 0 <= params.temperature < math.inf, "0 or more"),
        ("top_p", params.top_p, 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("top_k", params.top_k, params.top_k >= 0, "0 or more"),
        ("min_p", params.min_p, 0 <= params.min_p <= 1, "from 0 to 1"),
        ("min_tokens", params.min_tokens, params.min_tokens >= 0, "0 or more"),
        ("presence_penalty", params.presence_penalty, math.isfinite(params.presence_penalty), "a number"),
        ("frequency_penalty", params.frequency_penalty, math.isfinite(params.frequency_penalty), "a number"),
        ("repetition_penalty", params.repetition_penalty, 0 < params.repetition_penalty < math.inf, "above 0"),
        ("logprobs", params.logprobs, (params.logprobs or 0) >= 0, "0 or more"),
        ("prompt_logprobs", params.prompt_logprobs, (params.prompt_logprobs or 0) >= 0, "0 or more"),
        ("logit_bias", params.logit_bias, all(map(math.isfinite, bias)), "finite numbers"),
    )
    for name, value, fine, wanted in checks:
        if not fine:
            raise RequestError(f"{name} is {value}; it must be {wanted}.")
