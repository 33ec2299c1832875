"""The load stream on the real Redis: what goes in comes out, bounded, and garbage hurts nobody."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from predictor.load_step import LoadStep
from predictor.records import stack
from predictor.signals import LoadSignals
from recovery import load_stream
from recovery.directory import Directory
from recovery.load_stream import LoadMessage
from tests.predictor.steps import SHAPE, routings


def steps(count: int) -> list[LoadStep]:
    signals = LoadSignals(SHAPE)
    return [signals.observe(routing) for routing in routings(count)]


@pytest.fixture
def directory(redis_url: str, request: pytest.FixtureRequest) -> Directory:
    return Directory(redis_url, request.node.name)


def test_steps_come_out_as_they_went_in(directory: Directory) -> None:
    sent = steps(7)
    load_stream.send(directory, LoadMessage.of("g", SHAPE, sent, dropped=2))
    [message], place = load_stream.receive(directory, "0", 1.0)
    assert (message.gateway, message.dropped) == ("g", 2)
    found, expected = message.records(), stack(SHAPE, sent)
    assert found.shape == SHAPE
    for field in dataclasses.fields(expected):
        if field.name == "signals":
            np.testing.assert_allclose(found.signals, expected.signals, atol=1e-3)
        elif field.name != "shape":
            np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))
    assert load_stream.receive(directory, place, 0.01) == ([], place)


def test_a_reader_goes_on_where_it_was(directory: Directory) -> None:
    for name in "abc":
        load_stream.send(directory, LoadMessage.of(name, SHAPE, steps(2), dropped=0))
    place, names = "0", []
    while (found := load_stream.receive(directory, place, 0.01))[0]:
        messages, place = found
        names += [message.gateway for message in messages]
    assert names == ["a", "b", "c"]


def test_the_stream_is_bounded(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_stream, "_MOST", 5)
    for number in range(20):
        load_stream.send(directory, LoadMessage.of(str(number), SHAPE, steps(1), dropped=0))
    messages, _ = load_stream.receive(directory, "0", 1.0)
    assert [message.gateway for message in messages] == ["15", "16", "17", "18", "19"]


def test_large_messages_are_fewer(directory: Directory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_stream, "_MOST_BYTES", 1)
    for number in range(20):
        load_stream.send(directory, LoadMessage.of(str(number), SHAPE, steps(1), dropped=0))
    assert len(load_stream.receive(directory, "0", 1.0)[0]) == 4


def test_garbage_in_the_stream_is_left_out(directory: Directory) -> None:
    directory.append(load_stream.STREAM, b"garbage", keep=10)
    load_stream.send(directory, LoadMessage.of("g", SHAPE, steps(1), dropped=0))
    messages, _ = load_stream.receive(directory, "0", 1.0)
    assert [message.gateway for message in messages] == ["g"]


def test_a_message_of_another_release_is_told(directory: Directory) -> None:
    message = LoadMessage.of("g", SHAPE, steps(1), dropped=0)
    del message.columns["waiting"]
    with pytest.raises(ValueError, match="another release"):
        message.records()
