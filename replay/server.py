"""What a server can do, asked before a replay begins, so that what can't work is said at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np

from replay.client import Client
from replay.outcome import Outcome
from replay.prompts import Prompts, Stream
from replay.replayer import Asking
from replay.trace import TraceError, TraceRequest

_TIMEOUT = aiohttp.ClientTimeout(total=60.0)
_PIECE = 1 << 16  # characters tokenized at a time
_CHARACTERS_PER_TOKEN = 4.0
_SAMPLE = 1000  # characters whose tokens are counted where a server only takes text


class ServerError(TraceError):
    """A server that can't be replayed to; the message is one line for the operator."""


@dataclass(frozen=True)
class Served:
    """What a server serves."""

    model: str
    longest: int | None
    """Tokens of its context, where it says so"""


def base_url(url: str) -> str:
    """`url` without ``/v1``; raise ServerError where it is none."""
    if not url.startswith(("http://", "https://")) or not url.partition("://")[2]:
        raise ServerError(f"--url {url!r} is no URL: give http://HOST:PORT")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


async def ask_models(session: aiohttp.ClientSession, url: str, model: str | None) -> Served:
    """The model to be asked, and its context; raise ServerError where there is none."""
    address = f"{url}/v1/models"
    try:
        async with session.get(address) as answer:
            status = answer.status
            told = await answer.json(content_type=None) if status == 200 else None
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise ServerError(f"{address} does not answer as it should ({reason}): is a server there?") from error
    if status != 200:
        if status in (404, 405) and model is not None:
            return Served(model, None)
        remedy = "give the right --api-key" if status in (401, 403) else "give --model where there is no such list"
        raise ServerError(f"{address} answers with status {status}: {remedy}")
    models = {str(entry.get("id")): entry for entry in told.get("data", [])} if isinstance(told, dict) else {}
    if model is None and not models:
        raise ServerError(f"{address} lists no model: give --model")
    name = model if model is not None else next(iter(models))
    if models and name not in models:
        raise ServerError(f"model '{name}' is not served at {url}: choose one of {', '.join(models)}")
    longest = models.get(name, {}).get("max_model_len")
    return Served(name, longest if isinstance(longest, int) and longest > 0 else None)


@asynccontextmanager
async def open_session(api_key: str | None = None) -> AsyncIterator[aiohttp.ClientSession]:
    """A session for what is asked before a replay."""
    async with aiohttp.ClientSession(headers=key_header(api_key), timeout=_TIMEOUT) as session:
        yield session


def key_header(api_key: str | None) -> dict[str, str]:
    """The header that has the key; raise ServerError for one that no header can have."""
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise ServerError("--api-key has characters that no HTTP header may have: is there a line break in it?")
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


async def prompts_for(
    session: aiohttp.ClientSession,
    url: str,
    client: Client,
    asking: Asking,
    texts: Mapping[str, str],
    *,
    as_text: bool = False,
    seed: int = 0,
) -> Prompts:
    """Prompts that this server takes: token ids where it has ``/tokenize``, else text (always with `as_text`).

    Raise ServerError where it refuses what the replayer will send.
    """
    ids = None if as_text else await _tokenized(session, url, asking.model, texts)
    if ids is not None:
        prompts = Prompts(ids, seed=seed)
        if (await _try(client, asking, prompts)).error is None:
            return prompts
    return Prompts(
        texts, {kind: await _characters_per_token(client, asking, text) for kind, text in texts.items()}, seed
    )


async def _characters_per_token(client: Client, asking: Asking, text: str) -> float:
    """As the server counts the tokens of a sample of `text`; raise ServerError where it refuses that."""
    sample = text[:_SAMPLE]
    tried = await _try(client, asking, Prompts({"": sample}, {"": len(sample)}))
    if tried.error is not None:
        raise ServerError(
            f"the server refuses a completion ({tried.error}); --no-ignore-eos leaves out what not every server knows"
        )
    return len(sample) / tried.prompt_tokens_told if tried.prompt_tokens_told else _CHARACTERS_PER_TOKEN


async def _try(client: Client, asking: Asking, prompts: Prompts) -> Outcome:
    """One request, as the replay will send them."""
    request = TraceRequest(0, 0.0, 1, 1)
    outcome = Outcome(index=0, request_id="replay-try", due_s=0.0, prompt_tokens=1, answer_tokens=1)
    await client.send(asking.body(request, prompts.of(request)), outcome, 0.0)
    return outcome


async def _tokenized(
    session: aiohttp.ClientSession, url: str, model: str, texts: Mapping[str, str]
) -> dict[str, Stream] | None:
    """`texts` as the server's own tokens; None where it has no ``/tokenize``."""
    streams: dict[str, Stream] = {}
    for kind, text in texts.items():
        pieces = [await _tokens(session, url, model, text[at : at + _PIECE]) for at in range(0, len(text), _PIECE)]
        if any(piece is None for piece in pieces):
            return None
        streams[kind] = np.array([token for piece in pieces for token in piece or ()], np.int32)
    return streams if all(len(stream) for stream in streams.values()) else None


async def _tokens(session: aiohttp.ClientSession, url: str, model: str, text: str) -> list[int] | None:
    body: dict[str, Any] = {"model": model, "prompt": text, "add_special_tokens": False}
    try:
        async with session.post(f"{url}/tokenize", json=body) as answer:
            told = await answer.json(content_type=None) if answer.status == 200 else None
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return None
    tokens = told.get("tokens") if isinstance(told, dict) else None
    return tokens if isinstance(tokens, list) and all(isinstance(token, int) for token in tokens) else None
