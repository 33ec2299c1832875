"""The load stream in Redis: what gateways routed, step by step, for the planner. Bounded, and nobody waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import msgspec
import numpy as np

from predictor.load_step import LoadStep
from predictor.records import Records, stack
from predictor.shape import ModelShape
from recovery.directory import Directory

STREAM = "load"

_MOST_BYTES = 64 << 20
_FEWEST, _MOST = 4, 2000
"""Messages that the stream keeps, whatever their size."""


class LoadMessage(msgspec.Struct, frozen=True, array_like=True):
    """Some consecutive steps of one gateway."""

    gateway: str
    """The gateway's id in the directory; its clock is its own."""
    shape: str
    """`ModelShape.to_json`"""
    dropped: int
    """Steps before these that nobody will hear of."""
    columns: dict[str, tuple[str, list[int], bytes]]
    """As in `Records`: name -> (dtype, shape, numbers)"""

    @classmethod
    def of(cls, gateway: str, shape: ModelShape, steps: Sequence[LoadStep], dropped: int) -> LoadMessage:
        """The message of `steps`, in order."""
        records = stack(shape, steps)
        columns = {}
        for name in _COLUMNS:
            values = getattr(records, name)
            values = values.astype(np.float16) if name == "signals" else values
            columns[name] = (values.dtype.str, list(values.shape), values.tobytes())
        return cls(gateway, shape.to_json(), dropped, columns)

    def records(self) -> Records:
        """Its steps; raise ValueError for a message that is none."""
        columns = {
            name: np.frombuffer(numbers, np.dtype(kind)).reshape(size)
            for name, (kind, size, numbers) in self.columns.items()
        }
        if columns.keys() != set(_COLUMNS):
            raise ValueError("a message of another release is in the load stream")
        columns["signals"] = columns["signals"].astype(np.float32)
        return Records(shape=ModelShape.from_json(self.shape), **columns)

    def steps(self) -> list[LoadStep]:
        """Its steps, one by one; raise ValueError for a message that is none."""
        records = self.records()
        columns = [getattr(records, name) for name in _STEP]
        listed = [column.tolist() if column.ndim == 1 else column for column in columns]
        return [LoadStep(**dict(zip(_STEP, step, strict=True))) for step in zip(*listed, strict=True)]


_STEP = tuple(field.name for field in fields(LoadStep))
_COLUMNS = tuple(field.name for field in fields(Records) if field.name != "shape")


def send(directory: Directory, message: LoadMessage) -> None:
    """Append `message` to the stream; may raise Redis errors."""
    payload = msgspec.msgpack.encode(message)
    directory.append(STREAM, payload, keep=min(max(_MOST_BYTES // len(payload), _FEWEST), _MOST))


def receive(directory: Directory, after: str, wait_s: float) -> tuple[list[LoadMessage], str]:
    """Messages behind the place `after` (``$``: from now on), waiting for one; and the place behind these.

    What can't be read is left out. May raise Redis errors.
    """
    messages = []
    for place, payload in directory.entries(STREAM, after, wait_s):
        after = place
        try:
            messages.append(msgspec.msgpack.decode(payload, type=LoadMessage))
        except msgspec.DecodeError:
            continue
    return messages, after
