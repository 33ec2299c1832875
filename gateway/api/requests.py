"""Request bodies. Unknown fields are ignored; those in `gateway.api.unsupported` are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidatorFunctionWrapHandler, WrapValidator

MAX_SEQUENCES = 2048
"""Sequences of one request (prompts x n) at most."""
MAX_LOGPROBS = 20
_INT64 = 1 << 63


def _or(expected: str) -> WrapValidator:
    """One message for a union, in place of one for each of its branches."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValueError:
            raise ValueError(f"it must be {expected}") from None

    return WrapValidator(check)


Name = Annotated[str, Field(min_length=1)]
Tokens = list[int]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
StopString = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    """JSON types are taken as they are: ``"1"`` is no number, and 1 is no boolean."""

    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(Body):
    """What a stream carries besides the text."""

    include_usage: bool | None = None
    """A last chunk with the usage, and ``usage: null`` in those before."""
    continuous_usage_stats: bool | None = None
    """The usage so far in every chunk."""


class JsonSchema(Body):
    """What ``json_schema`` of a response format holds."""

    name: Name
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None
    """False: what can't be enforced of the schema is left out of account, otherwise it is refused."""


class ResponseFormat(Body):
    """What the answer is to look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class SamplingRequest(Body):
    """What completions and chat completions have in common."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    """0 and -1 keep every token."""
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: (
        Annotated[
            StopString | Annotated[list[StopString], Field(max_length=16)],
            _or("a string or a list of at most 16 strings, none of them empty"),
        ]
        | None
    ) = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    logit_bias: dict[str, Bias] | None = None
    """Token id -> what is added to its logit."""
    response_format: ResponseFormat | None = None
    skip_special_tokens: bool | None = None
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    """Lower goes first; default 0."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionRequest(SamplingRequest):
    """``POST /v1/completions``."""

    prompt: Annotated[
        str | list[str] | Tokens | list[Tokens],
        _or("a string, a list of strings, a list of token ids, or a list of lists of token ids"),
    ]
    add_special_tokens: bool | None = None
    """Frame text prompts as the model expects a text (BOS, say); default true."""
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    """0 is for `echo` alone: nothing is generated."""
    echo: bool | None = None
    """Begin the answer with the prompt."""
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    """So many of the likeliest tokens in the place of each one, and that one's own log-probability."""
    best_of: Annotated[int, Field(ge=1)] | None = None
    """Only what `n` is: every answer made is given."""


class TextPart(Body):
    """The one kind of content part a text model reads."""

    type: Literal["text"]
    text: str


def _no_tools(calls: list[Any]) -> list[Any]:
    if calls:
        raise ValueError("tools are not supported by this server")
    return calls


class Message(Body):
    """One turn; what a template knows besides these fields is passed on to it."""

    role: Name
    content: Annotated[str | list[TextPart], _or("a string or a list of parts of type `text`")] | None = None
    name: str | None = None
    tool_calls: Annotated[list[Any], AfterValidator(_no_tools)] | None = None


class ChatRequest(SamplingRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of ``max_tokens``; it counts where both are given."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    reasoning_effort: str | None = None
    """Passed on to templates that know it."""
    chat_template_kwargs: dict[str, Any] | None = None
    """More variables for the template (``enable_thinking``, say)."""
