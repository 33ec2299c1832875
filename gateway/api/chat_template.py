"""A model's chat template, rendered as transformers does, without importing transformers (seconds of start-up)."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]

_REFUSALS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template raises, on purpose or not, for a conversation it was not written for."""


class TemplateError(ValueError):
    """The template is broken, or refuses the conversation; the message is one line."""


class ChatTemplate:
    """A compiled template; `variables` are what it sees besides the conversation (``bos_token`` and the like)."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the model's chat template is broken: {error}") from error
        self._variables = dict(variables)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as the model was trained to see it; raise TemplateError where the template refuses it."""
        known = {"tools": None, "documents": None, **self._variables, **variables}
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            return self._template.render(messages=present, add_generation_prompt=add_generation_prompt, **known)
        except _REFUSALS as error:
            reason = " ".join(str(error).split())
            raise TemplateError(f"the model's chat template refuses the conversation: {reason}") from error


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``: marks the assistant's text for training; rendered as if the tag was not there."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own protocol

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    """The sandbox templates are written for: https://huggingface.co/docs/transformers/chat_templating_writing."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
