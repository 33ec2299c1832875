"""Log-probabilities in the shapes of the two endpoints."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.api.responses import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TokenLogprob
from gateway.api.text import ScoredToken
from gateway.api.token_bytes import TokenBytes

_LEAST = -9999.0
"""In place of minus infinity, which JSON has not."""


def of_completion(tokens: Sequence[ScoredToken], texts: TokenBytes) -> CompletionLogprobs:
    """OpenAI's older shape; parts of characters are written ``bytes:\\xe6\\x97``."""
    return CompletionLogprobs(
        text_offset=[token.offset for token in tokens],
        token_logprobs=[None if token.logprob is None else max(token.logprob, _LEAST) for token in tokens],
        tokens=[_written(texts.bytes_of(token.token), "bytes:") for token in tokens],
        top_logprobs=[_top(token, texts) for token in tokens],
    )


def of_chat(tokens: Sequence[ScoredToken], texts: TokenBytes) -> ChatLogprobs:
    """The shape of chat completions; parts of characters are written ``\\xe6\\x97``."""
    return ChatLogprobs(content=[_chat_token(token, texts) for token in tokens])


def _chat_token(token: ScoredToken, texts: TokenBytes) -> ChatTokenLogprob:
    own = _token(token.token, token.logprob or 0.0, texts)
    top = [_token(other, logprob, texts) for other, logprob in token.best]
    return ChatTokenLogprob(token=own.token, bytes=own.bytes, logprob=own.logprob, top_logprobs=top)


def _top(token: ScoredToken, texts: TokenBytes) -> dict[str, float] | None:
    """The likeliest tokens and the token itself. Where two are written alike, the likelier counts."""
    if token.logprob is None:
        return None
    top: dict[str, float] = {}
    for other, logprob in (*token.best, (token.token, token.logprob)):
        top.setdefault(_written(texts.bytes_of(other), "bytes:"), max(logprob, _LEAST))
    return top


def _token(token: int, logprob: float, texts: TokenBytes) -> TokenLogprob:
    content = texts.bytes_of(token)
    return TokenLogprob(token=_written(content), bytes=list(content), logprob=max(logprob, _LEAST))


def _written(content: bytes, prefix: str = "") -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in content)
