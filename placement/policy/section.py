"""What every section of a policy file has in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

CONTRADICTION = "contradiction"
"""Type of the error of keys that do not go together; its context `found` lists (key, sentence)."""


class Section(BaseModel):
    """Keys with defaults; the docstring below a key is its description in the JSON schema."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """(key, what is wrong and what to do) of keys, each valid alone, that do not go together."""
        yield from ()

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes `yes` for 1."""
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise PydanticCustomError("switch", "should not be true or false")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Section:
        found = list(self.contradictions())
        if found:
            text = "; ".join(f"{key}: {sentence}" for key, sentence in found)
            raise PydanticCustomError(CONTRADICTION, "{text}", {"text": text, "found": found})
        return self
