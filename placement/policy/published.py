"""The policy that a service runs, as it is published in the directory."""

from __future__ import annotations

from typing import Any

import msgspec

from placement.policy.fitting import ModelFacts
from placement.policy.policy import Policy
from placement.policy.reading import parse_policy

DOCUMENT = "policy"
"""The policy's name in the directory."""


class PublishedPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """A policy, and the model that it is for."""

    version: int
    """Grows with every policy that is applied."""
    made_at: float
    """Seconds since the epoch."""
    model: ModelFacts
    policy: dict[str, Any]
    """The whole of it, as YAML has it."""

    @classmethod
    def of(cls, policy: Policy, model: ModelFacts, version: int, made_at: float) -> PublishedPolicy:
        """`policy`, to be published."""
        return cls(version=version, made_at=made_at, model=model, policy=policy.model_dump(mode="json"))

    def read(self) -> Policy:
        """The policy; raise PolicyError where it is none for this version of Evermoe."""
        return parse_policy(self.policy, "the policy of the service")


def encode(published: PublishedPolicy) -> bytes:
    """The policy as JSON."""
    return msgspec.json.encode(published)


def decode(document: bytes) -> PublishedPolicy:
    """The policy of a JSON document; raise msgspec.DecodeError where it is none."""
    return msgspec.json.decode(document, type=PublishedPolicy)
