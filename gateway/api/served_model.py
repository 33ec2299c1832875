"""What the api knows of the model it serves, read from the store's small JSON files."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from experts.errors import StoreError
from gateway.api.errors import ApiError
from gateway.api.keys import Key
from gateway.api.token_bytes import TokenBytes
from gateway.api.tokenizer import Tokenizer
from placement.policy import ApiPolicy

_SHOWN = 100
"""Characters of a client's name for a model that an error repeats."""


@dataclass(frozen=True, kw_only=True)
class ApiConfig:
    """What an api process is told."""

    store: Path
    """The expert store: its configuration and tokenizer are read."""
    model_name: str
    """The name clients use."""
    context_length: int | None = None
    """Tokens of prompt and answer together at most; None is what the model was made for."""
    policy: ApiPolicy = field(default_factory=ApiPolicy)
    keys: tuple[Key, ...] = ()
    """The policy's keys, read where the service was started; none: everybody may ask."""
    request_ids: bool = True
    """Answer with ``x-request-id``; False behind a proxy that does (Ray Serve's), lest the header is there twice."""


@dataclass(frozen=True)
class SamplingDefaults:
    """For requests that leave them out: what the model's generation_config.json says, else OpenAI's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model under one name."""

    name: str
    tokenizer: Tokenizer
    context_length: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    defaults: SamplingDefaults = SamplingDefaults()
    created: int = field(default_factory=lambda: int(time.time()))
    """Unix time in seconds."""

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of single tokens."""
        return TokenBytes(self.tokenizer)

    @classmethod
    def load(cls, config: ApiConfig) -> ServedModel:
        """Read the store; raise StoreError where a file is missing or says too little."""
        whole = _read(config.store / "config.json")
        generation = _read(config.store / "generation_config.json", missing={})
        text = whole | whole.get("text_config", {})
        tokenizer = Tokenizer.load(config.store)
        return cls(
            name=config.model_name,
            tokenizer=tokenizer,
            context_length=config.context_length or _number(text, "max_position_embeddings", config.store),
            vocab_size=_number(text, "vocab_size", config.store),
            eos_token_ids=_eos(generation, text, tokenizer),
            defaults=_defaults(generation),
        )

    def check_name(self, name: str | None) -> None:
        """Raise a 404 where a client asks for another model; None is this one."""
        if name is not None and name != self.name:
            shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
            message = f"The model `{shown}` does not exist; this server has `{self.name}`."
            raise ApiError(404, message, param="model", code="model_not_found")


def _read(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing is None:
            raise StoreError(f"{path} is missing: prepare the store again") from None
        return missing
    except ValueError as error:
        raise StoreError(f"{path} is not valid JSON ({error}): prepare the store again") from error
    if not isinstance(content, dict):
        raise StoreError(f"{path} holds no JSON object: prepare the store again")
    return content


def _number(config: Mapping[str, Any], name: str, store: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise StoreError(f"{store / 'config.json'} has no usable {name} ({value!r}): take the model's own file")
    return value


def _eos(generation: Mapping[str, Any], config: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids that end an answer: generation_config.json may list several, config.json often knows just one."""
    for source in (generation, config):
        found = source.get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    token = tokenizer.special.get("eos_token")
    found = None if token is None else tokenizer.token_id(token)
    return () if found is None else (found,)


def _defaults(generation: Mapping[str, Any]) -> SamplingDefaults:
    known = {name: generation[name] for name in ("temperature", "top_p", "top_k") if generation.get(name) is not None}
    return SamplingDefaults(**known)
