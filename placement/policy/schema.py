"""The policy's JSON schema, for editors and other tools."""

from __future__ import annotations

from typing import Any

from placement.policy.policy import Policy


def schema() -> dict[str, Any]:
    """JSON schema of a policy file; every key has a description and a default."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Policy.model_json_schema()}
