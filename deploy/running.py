"""A service that runs: its directory, for operators who may change what stands there.

It is asked over HTTP where its directory is; changing anything takes access to its Redis, which no client has.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis
from msgspec import structs

from deploy.status import StatusError, fetch_status
from placement.policy import Policy
from placement.policy.published import DOCUMENT, PublishedPolicy, decode, encode
from recovery.directory import Directory


@dataclass(frozen=True)
class Running:
    """A service, its directory, and the policy it goes by, as it stands there."""

    url: str
    directory: Directory
    published: PublishedPolicy
    document: bytes

    def apply(self, policy: Policy) -> int:
        """Let the service go by `policy`; its version. Raise StatusError where another one was applied meanwhile."""
        version = self.published.version + 1
        published = PublishedPolicy.of(policy, self.published.model, version, time.time())
        if not self.directory.exchange(DOCUMENT, self.document, encode(published)):
            raise StatusError("another policy was applied meanwhile: look at it (`evermoe policy show`) and try again")
        return version


def find_running(url: str, redis_url: str | None) -> Running:
    """The service at `url`; raise StatusError or DirectoryError where it or its Redis can't be reached."""
    report = fetch_status(url)
    if "directory" not in report:
        raise StatusError(f"{url} is a service of another release: use its own `evermoe`")
    directory = Directory(_redis_of(report["directory"], redis_url), report["directory"]["namespace"])
    directory.wait()
    try:
        document = directory.read(DOCUMENT)
    except redis.RedisError as error:
        raise StatusError(
            f"Redis at {directory.url} can't be used ({error}): is it the one that {url} uses?"
        ) from error
    if document is None:
        raise StatusError(f"no policy stands in Redis at {directory.url}: is it the one that {url} uses?")
    published = decode(document)
    named = structs.replace(published, model=replace(published.model, name=report["model"]))
    return Running(url, directory, named, document)


def _redis_of(directory: dict[str, Any], given: str | None) -> str:
    url = given or directory["socket"] or os.environ.get("REDIS_URL")
    if not url:
        raise StatusError("the service's Redis is one of yours: set REDIS_URL, or give --redis")
    parts = urlsplit(url)
    if parts.scheme == "unix" and not Path(parts.path).exists():
        raise StatusError(f"the service's Redis listens on {parts.path} of its own host: run this command there")
    return str(url)
