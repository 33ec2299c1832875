"""API keys: who asks. Only their SHA-256 is kept, and a check takes as long for a wrong key as for a right one."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from dataclasses import dataclass

from gateway.api.errors import ApiError
from placement.policy import KeyPolicy

_WHERE = "Give your API key in the header `Authorization: Bearer KEY`."


class KeySourceError(ValueError):
    """A key of the policy can't be read; the message is one line for the operator and has no key in it."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """One client."""

    name: str
    digest: bytes
    """SHA-256 of the key."""
    max_concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @property
    def limited(self) -> bool:
        """Whether any limit has to be kept."""
        return any((self.max_concurrent, self.requests_per_minute, self.tokens_per_minute))


def load_keys(policies: Iterable[KeyPolicy]) -> tuple[Key, ...]:
    """The keys of a policy, those in environment variables and files read here; raise KeySourceError."""
    return tuple(
        Key(
            name=policy.name,
            digest=_digest(policy),
            max_concurrent=policy.max_concurrent,
            requests_per_minute=policy.requests_per_minute,
            tokens_per_minute=policy.tokens_per_minute,
        )
        for policy in policies
    )


def identify(keys: Iterable[Key], authorization: str | None) -> Key:
    """The key in an ``Authorization`` header; raise a 401 where it is none of `keys`."""
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise _refusal(f"You didn't provide an API key. {_WHERE}")
    digest = hashlib.sha256(token.strip().encode()).digest()
    matches = [key for key in keys if hmac.compare_digest(key.digest, digest)]  # all are compared, always
    if not matches:
        raise _refusal(f"Incorrect API key provided. {_WHERE}")
    return matches[0]


def _refusal(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _digest(policy: KeyPolicy) -> bytes:
    if policy.sha256 is not None:
        return bytes.fromhex(policy.sha256)
    where = f"api.keys: the key of '{policy.name}'"
    if policy.env is not None:
        text = os.environ.get(policy.env, "")
        where += f" is not in the environment variable {policy.env}: set it"
    else:
        assert policy.file is not None
        where += f" is not in {policy.file}: write it there"
        try:
            text = policy.file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise KeySourceError(f"{where} ({getattr(error, 'strerror', None) or 'not text'})") from error
    if not text.strip():
        raise KeySourceError(where)
    return hashlib.sha256(text.strip().encode()).digest()
