"""The sections `gateway` and `api`: the persistent side and its HTTP edge."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from placement.policy.section import Section


class GatewayPolicy(Section):
    """The persistent side."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto, cpu, cuda or cuda:N; `auto` takes CUDA where there is one."""
    threads: int = Field(default=0, ge=0)
    """Torch threads; 0 takes one per core."""
    replicas: int = Field(default=1, ge=1, le=64)
    """Gateways, each with its own KV cache; with two or more the others take over at once when one is lost."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Memory for cached keys and values, GiB."""
    max_batch_tokens: int = Field(default=512, ge=1)
    """Rows in one step at most: longer prompts are prefilled in chunks."""
    max_running: int = Field(default=64, ge=1)
    """Sequences in one step at most."""
    max_waiting: int = Field(default=1024, ge=0)
    """Sequences that wait for a place at most; more are refused with status 429."""
    prefix_caching: bool = True
    """Keep finished sequences' keys and values while there is room, for prompts that begin alike."""
    inline: Literal["fallback", "prefer", "never"] = "fallback"
    """Where the gateway computes experts itself: `fallback` only what no replica serves, `prefer` also whatever is
    faster here than over the wire (the weights are then held in the gateway's memory), `never` waits for replicas;
    every unit then keeps at least one."""
    compile: bool = True
    """Compile the decoder layers in the background, at the lowest priority, where there is a C++ compiler."""
    call_deadline_s: float = Field(default=10.0, gt=0)
    """A replica that has not answered by then is given up and its rows run elsewhere (usually far sooner)."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """A step has room for a token of each running sequence."""
        if self.max_batch_tokens < self.max_running:
            yield (
                "max_batch_tokens",
                f"{self.max_batch_tokens} has no room for one token of each of max_running ({self.max_running}) "
                "sequences: raise it, or lower max_running",
            )


class KeyPolicy(Section):
    """One client's API key and what it may use. The key itself never stands in the policy."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """How logs and errors call the client."""
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")
    """The key's SHA-256, in hexadecimal ..."""
    env: str | None = Field(default=None, min_length=1)
    """... or the environment variable that holds the key ..."""
    file: Path | None = None
    """... or a file that holds nothing else."""
    max_concurrent: int | None = Field(default=None, ge=1)
    """Requests at a time; null: no bound."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests in a minute; null: no bound."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Prompt tokens, counted before a request, and generated ones, counted after it; null: no bound."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """A key comes from one place."""
        if sum(source is not None for source in (self.sha256, self.env, self.file)) != 1:
            yield "", "give one of sha256, env and file"


class ApiPolicy(Section):
    """The HTTP edge."""

    keys: tuple[KeyPolicy, ...] = ()
    """Who may ask; nobody is asked for a key where none are listed."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may call from a browser; "*" is any."""
    max_body_mib: float = Field(default=16.0, gt=0, le=1024)
    """Largest request body, MiB."""
    body_timeout_s: float = Field(default=30.0, gt=0)
    """A request's body must have arrived by then."""
    request_timeout_s: float | None = Field(default=None, gt=0)
    """A request ends in an error after so long, unless its x-request-timeout header says less; null: never."""
    drain_s: float = Field(default=30.0, ge=0, le=3600)
    """What running requests get to finish when the service ends."""
    request_log: Path | None = None
    """File for the log of requests, one JSON object a line; null: the process's standard output."""

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Names tell keys apart."""
        names = [key.name for key in self.keys]
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            yield "keys", f"two are called '{name}': give each a name of its own"
