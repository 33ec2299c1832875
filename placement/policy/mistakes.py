"""What is wrong with a policy, in words."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from placement.policy.policy import Policy
from placement.policy.section import CONTRADICTION

_LONGEST = 60
"""Characters of a value that are repeated."""


def mistakes(error: ValidationError) -> list[str]:
    """One line for each key that is wrong: `key: what is wrong`, unknown ones with the nearest known one."""
    said: dict[str, list[str]] = {}
    for each in error.errors():
        if each["type"] == "extra_forbidden":
            said[_unknown(each["loc"])] = []
        elif each["type"] == CONTRADICTION:
            said.update({f"{_join(*each['loc'], key)}: {text}": [] for key, text in each["ctx"]["found"]})
        else:
            where = _join(*_keys(each["loc"]))
            said.setdefault(where, []).append(_reason(where, each["msg"], each["input"]))
    return [
        f"{where}: {', or '.join(reasons)}" if reasons else where
        for where, reasons in said.items()
        if not any(other.startswith(f"{where}.") for other in said)  # one alternative came further than this one
    ]


def _reason(where: str, message: str, value: Any) -> str:
    message = message.removeprefix("Input ")
    if where.startswith("api.keys"):
        return message  # what was given may be a key
    text = repr(value)
    return f"{message} (got {text if len(text) <= _LONGEST else text[:_LONGEST] + ' ...'})"


def _unknown(location: tuple[int | str, ...]) -> str:
    *parents, key = location
    where, sections = _join(*_keys(location)), list(_walk(parents))
    known = list(sections[-1].model_fields)
    near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key '{where}': {hint}"


def _walk(location: list[int | str]) -> Iterator[type[BaseModel]]:
    """The sections on the way to a place in a policy."""
    yield Policy
    section: type[BaseModel] = Policy
    for name in location:
        field = section.model_fields.get(str(name))
        inner = None if field is None else _section(field.annotation)
        if inner is not None:
            section = inner
            yield section


def _keys(location: tuple[int | str, ...]) -> Iterator[int | str]:
    """The place without what pydantic adds to it for each alternative of a type."""
    section: type[BaseModel] | None = Policy
    annotation: Any = None
    for part in location:
        if isinstance(part, int):
            yield part
        elif section is not None:
            yield part
            field = section.model_fields.get(part)
            annotation = None if field is None else field.annotation
            section = _section(annotation)
        elif get_origin(annotation) is dict and part != "[key]":
            yield part


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section that a key holds, alone or in a list; None for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, list, Union, UnionType):
        return next((found for found in map(_section, get_args(annotation)) if found is not None), None)
    return None


def _join(*parts: int | str) -> str:
    return ".".join(str(part) for part in parts if part != "")
