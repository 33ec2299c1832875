"""What a model looks like to the predictor."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class ModelShape:
    """A model's MoE layers and experts. Records and trained models are only good for the shape they were made with."""

    fingerprint: str
    """Of the model's expert store."""
    layers: tuple[int, ...]
    """Numbers of the model's MoE layers, in order."""
    experts: int
    top_k: int
    """Experts that each row is sent to."""
    vocabulary: int

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ValueError(f"a model shape's layers must be distinct numbers in rising order, not {self.layers}")
        if self.vocabulary < 1 or not 1 <= self.top_k <= self.experts:
            raise ValueError(
                f"no model has {self.experts} experts, top-{self.top_k}, and a vocabulary of {self.vocabulary}"
            )

    def __str__(self) -> str:
        name = self.fingerprint[:12] or "none"
        return f"{len(self.layers)} layers x {self.experts} experts top-{self.top_k} (fingerprint {name})"

    def to_json(self) -> str:
        """The shape as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> ModelShape:
        """The shape `to_json` wrote; raise ValueError for anything else."""
        try:
            fields = json.loads(text)
            return cls(**{**fields, "layers": tuple(fields["layers"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"this describes no model shape: {text!r}") from error
