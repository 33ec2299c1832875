"""The forecast of expert load: what the planner publishes in the directory."""

from __future__ import annotations

import msgspec

DOCUMENT = "forecast"
"""The forecast's name in the directory."""


class LayerForecast(msgspec.Struct, frozen=True, kw_only=True):
    """One MoE layer. Lists have an entry for each expert; rows are (token, expert) pairs."""

    layer: int
    """Its number in the model."""
    method: str
    """What forecasts it."""
    reason: str
    """Why that, in words."""
    expected: list[float]
    """Rows to come within the horizon."""
    p90: list[float]
    """Rows that are exceeded one time in ten."""
    forecast: list[float] = []
    """The last forecast whose horizon has passed: share of the layer's rows; empty before the first ..."""
    actual: list[int] = []
    """... and the rows that then came."""
    error: float | None = None
    """Mean of the latest forecasts' errors: half the L1 distance of shares, the part of rows put on wrong experts."""


class LoadForecast(msgspec.Struct, frozen=True, kw_only=True):
    """What a planner expects, and how it did so far."""

    made_at: float
    """Seconds since the epoch."""
    horizon_s: float
    gateways: list[str]
    """Whose load it is, the gateway that was heard of last at the end."""
    steps: int
    """Of all of them, seen so far."""
    model: int
    """Version of the trained predictor; 0: none yet, averages with much room above them."""
    trained_steps: int
    """Steps it was trained from."""
    training: str
    """What is learned at the moment, or why nothing is."""
    layers: list[LayerForecast]


def encode(forecast: LoadForecast) -> bytes:
    """The forecast as JSON."""
    return msgspec.json.encode(forecast)


def decode(document: bytes) -> LoadForecast:
    """The forecast of a JSON document; raise msgspec.DecodeError where it is none."""
    return msgspec.json.decode(document, type=LoadForecast)
