"""What a compiled layer calls back for: products with packed weights, attention over the paged cache, experts.

Compiled code sees three opaque operators. They tell layers apart by a tensor that holds the layer's number, so that one
compiled layer serves all layers of its kind; what they work on is the `Callbacks` of the model that is running.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch

_library: Any = torch.library.Library("evermoe", "DEF")  # type: ignore[no-untyped-call]
_LINEAR = "(Tensor rows, Tensor layer, int slot, int out) -> Tensor"
_ATTEND = "(Tensor query, Tensor keys, Tensor? values, Tensor layer, float scaling, Tensor? sinks, int width) -> Tensor"
_library.define("linear" + _LINEAR)
_library.define("attend" + _ATTEND)
_library.define("experts(Tensor hidden, Tensor index, Tensor weights, Tensor layer) -> Tensor")


class Callbacks(Protocol):
    """The running model's side."""

    def linear(self, layer: int, slot: int, rows: torch.Tensor) -> torch.Tensor:
        """The layer's product number `slot`: rows [..., in] to [..., out]."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """As `gateway.attention.Attending.attend`, by the mask rule of the layer."""

    def experts(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As `gateway.layer_calls.ExpertsFunction`."""


class _Thread(threading.local):
    callbacks: Callbacks | None = None
    traced_layer: torch.Tensor | None = None


_thread = _Thread()


@contextmanager
def answering(callbacks: Callbacks) -> Iterator[None]:
    """Compiled layers that this thread runs meanwhile call `callbacks`."""
    before, _thread.callbacks = _thread.callbacks, callbacks
    try:
        yield
    finally:
        _thread.callbacks = before


@contextmanager
def tracing(layer: torch.Tensor) -> Iterator[None]:
    """Modules that this thread runs meanwhile emit the operators, for the layer whose number `layer` holds."""
    before, _thread.traced_layer = _thread.traced_layer, layer
    try:
        yield
    finally:
        _thread.traced_layer = before


def traced_layer() -> torch.Tensor | None:
    """The layer that is being traced; None when modules compute."""
    return _thread.traced_layer


def _callbacks() -> Callbacks:
    if _thread.callbacks is None:
        raise RuntimeError("a compiled layer ran outside of its model")
    return _thread.callbacks


def _linear(rows: torch.Tensor, layer: torch.Tensor, slot: int, out: int) -> torch.Tensor:
    return _callbacks().linear(int(layer), slot, rows)


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    layer: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor | None,
    width: int,
) -> torch.Tensor:
    out = _callbacks().attend(int(layer), query, keys, keys if values is None else values, scaling, sinks)
    return out.contiguous()  # as its description below says


def _experts(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
    return _callbacks().experts(int(layer), hidden, index, weights)


# Where our kernels are loaded they answer what they were told of, and ask for the rest under its second name.
for _name, _schema, _answer in (("linear", _LINEAR, _linear), ("attend", _ATTEND, _attend)):
    _library.impl(_name, _answer, "CompositeExplicitAutograd")
    _library.define(f"{_name}_in_python{_schema}")
    _library.impl(f"{_name}_in_python", _answer, "CPU")
_library.impl("experts", _experts, "CPU")


@torch.library.register_fake("evermoe::linear", lib=_library)  # type: ignore[untyped-decorator]
def _(rows: torch.Tensor, layer: torch.Tensor, slot: int, out: int) -> torch.Tensor:
    return rows.new_empty(*rows.shape[:-1], out)


@torch.library.register_fake("evermoe::attend", lib=_library)  # type: ignore[untyped-decorator]
def _(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    layer: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor | None,
    width: int,
) -> torch.Tensor:
    return query.new_empty(query.shape[1], query.shape[0], width)


@torch.library.register_fake("evermoe::experts", lib=_library)  # type: ignore[untyped-decorator]
def _(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def traced_linear(rows: torch.Tensor, layer: torch.Tensor, slot: int, out: int) -> torch.Tensor:
    """Emit the product number `slot` of the traced layer."""
    return cast(torch.Tensor, torch.ops.evermoe.linear(rows, layer, slot, out))


def traced_experts(
    hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, layer: torch.Tensor
) -> torch.Tensor:
    """Emit the traced layer's experts."""
    return cast(torch.Tensor, torch.ops.evermoe.experts(hidden, index, weights, layer))


def traced_attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layer: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Emit the traced layer's attention."""
    own = None if values is keys else values
    return cast(torch.Tensor, torch.ops.evermoe.attend(query, keys, own, layer, scaling, sinks, values.shape[-1]))
