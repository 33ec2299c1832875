"""``response_format``: what the answer must look like, as a grammar for the gateway."""

from __future__ import annotations

import asyncio
import functools
import json
from typing import Any

import llguidance

from gateway.api.errors import ApiError, invalid
from gateway.api.requests import ResponseFormat

_LONG_SCHEMA = 4096
"""Characters from which a schema is compiled in a thread."""
_WHITESPACE = r"\x20|\x0A[\x20\x09]{0,24}"
"""Between two parts of JSON a space, or a new line and its indentation: given more, some models never find an end."""
_ANY_OBJECT = '{"type":"object"}'


async def grammar_of(format: ResponseFormat | None) -> str | None:
    """The grammar that `format` asks for, if any; raise ApiError for what can't be enforced."""
    if format is None or format.type == "text":
        return None
    schema, lenient = _schema(format)
    if len(schema) < _LONG_SCHEMA:
        return _compile(schema, lenient)
    return await asyncio.to_thread(_compile, schema, lenient)


def _schema(format: ResponseFormat) -> tuple[str, bool]:
    """The schema as JSON, and whether keywords that can't be enforced are overlooked."""
    if format.type == "json_object":
        return _ANY_OBJECT, False
    if format.json_schema is None:
        raise invalid("response_format", "`response_format.json_schema` is required with the type `json_schema`.")
    schema: dict[str, Any] = format.json_schema.schema_ or {}
    try:
        return json.dumps(schema), format.json_schema.strict is False
    except (ValueError, RecursionError) as error:
        raise _unusable(str(error)) from error


@functools.lru_cache(maxsize=128)
def _compile(schema: str, lenient: bool) -> str:
    options = {"whitespace_pattern": _WHITESPACE, "lenient": lenient}
    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]
    except ValueError as error:
        raise _unusable(str(error)) from error
    failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar)
    if failed:
        raise _unusable(messages[0])
    return str(grammar)


def _unusable(reason: str) -> ApiError:
    shown = " ".join(reason.split())[:300].rstrip(".")
    return invalid("response_format", f"The schema of `response_format` can't be used: {shown}.")
