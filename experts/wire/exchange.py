"""A layer's calls to all its replicas at once, and their replies; in one compiled call each where that is built.

The compiled way (exchange.h) is for channels that share memory. It gives back whatever is not a plain reply, and
channels judge that as they do without it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import chain

import torch

from experts import kernels
from experts.wire import frame
from experts.wire.channel import Call, CallRefusedError, Channel

_GRACE_S = 0.001
"""For an answer that is there already when its time is up."""
_NOT_A_REPLY = -74  # EBADMSG

Outcome = float | str
"""Seconds until the reply was there, or why there is none."""


def send(calls: Sequence[tuple[Channel, Call]]) -> list[str | None]:
    """Start every call on its channel: for each why it could not be, or None.

    All frames are made before the first is sent: from then on the replicas want the cores for themselves.
    """
    if kernels.loaded() and all(channel.has(call.arena) for channel, call in calls):
        for channel, call in calls:
            channel.outstanding = call
        return [os.strerror(code) if code else None for code in _send(calls)]
    frames = [channel.pack(call) for channel, call in calls]
    return [_started(channel, call, packed) for (channel, call), packed in zip(calls, frames, strict=True)]


def receive(channels: Sequence[Channel], patience: Sequence[float]) -> list[Outcome]:
    """Wait for the reply to the outstanding call of each channel, at most its `patience` in seconds from now.

    The last is waited for first: when it is there the others mostly are too, and the replicas have not been interrupted
    by this thread waking up for each of them.
    """
    started = time.perf_counter()
    if kernels.loaded() and all(channel.shares_memory and channel.outstanding for channel in channels):
        return _receive(channels, patience)
    outcomes = [
        _reply(channel, started + limit, started)
        for channel, limit in zip(reversed(channels), reversed(patience), strict=True)
    ]
    return outcomes[::-1]


def _started(channel: Channel, call: Call, packed: bytes) -> str | None:
    try:
        channel.send(call, packed)
    except OSError as error:
        return _reason(error)
    return None


def _reply(channel: Channel, until: float, started: float, header: bytes | None = None) -> Outcome:
    left = max(until - time.perf_counter(), _GRACE_S)
    try:
        channel.receive(left, header)
    except (OSError, CallRefusedError) as error:
        return _reason(error)
    return time.perf_counter() - started


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _send(calls: Sequence[tuple[Channel, Call]]) -> list[int]:
    heads = [
        (c.seq, c.layer, frame.DTYPES.index(c.dtype), c.arena.id, c.offset, c.rows, c.width, len(c.segments))
        for _, c in calls
    ]
    segments = chain.from_iterable(chain.from_iterable(call.segments for _, call in calls))
    sockets = [channel.fileno() for channel, _ in calls]
    failures: list[int] = torch.ops.evermoe.send_calls.default(
        sockets, list(chain.from_iterable(heads)), list(segments)
    )
    return failures


def _receive(channels: Sequence[Channel], patience: Sequence[float]) -> list[Outcome]:
    started = time.perf_counter()
    calls = [channel.outstanding for channel in channels]
    headers = torch.empty(len(channels), frame.HEADER.size, dtype=torch.uint8)
    spent = torch.ops.evermoe.receive_replies.default(
        [channel.fileno() for channel in channels],
        [call.seq for call in calls if call],
        [call.rows for call in calls if call],
        [int(1e9 * limit) for limit in patience],
        int(1e9 * _GRACE_S),
        headers,
    )
    outcomes: list[Outcome] = []
    for channel, limit, took, header in zip(channels, patience, spent, headers, strict=True):
        if took >= 0:
            channel.outstanding = None
            outcomes.append(1e-9 * took)
        elif took == _NOT_A_REPLY:
            outcomes.append(_reply(channel, started + limit, started, bytes(header.tolist())))
        else:
            outcomes.append(os.strerror(-took))
    return outcomes
