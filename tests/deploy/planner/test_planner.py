"""The planner on a real Redis: it forecasts what is streamed, learns beside it, and outlives what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from deploy.planner.planner import Planner
from deploy.planner.steering import ModelSlices
from deploy.planner.training import Memory, Training
from placement import forecast
from placement.cost import Speed
from placement.forecast import LoadForecast
from placement.policy import PlannerPolicy, Policy, PredictorPolicy, UnitPolicy
from placement.unit import make_units
from predictor import storage
from predictor.load_step import LoadStep
from predictor.records import stack
from predictor.retraining import RetrainPolicy
from predictor.signals import LoadSignals
from recovery import load_stream
from recovery.directory import Directory
from recovery.load_stream import LoadMessage
from recovery.redis_server import RedisServer
from tests.predictor.steps import SHAPE, routings
from tests.waiting import eventually

POLICY = Policy(
    predictor=PredictorPolicy(interval_s=0.1, horizon_s=1.0), planner=PlannerPolicy(interval_s=0.1, idle_to_zero_s=None)
)
UNITS = tuple(make_units(UnitPolicy(), SHAPE.experts, SHAPE.layers))
MODEL = ModelSlices(UNITS, SHAPE.layers, SHAPE.experts, slice_bytes=1 << 20, speed=Speed(1e-4, 1e-5))
Start = Callable[..., Planner]


@pytest.fixture(scope="module")
def steps() -> list[LoadStep]:
    """A step every 50 ms."""
    signals = LoadSignals(SHAPE)
    return [signals.observe(routing) for routing in routings(3000)]


@pytest.fixture
def directory(redis_url: str, request: pytest.FixtureRequest) -> Directory:
    return Directory(redis_url, request.node.name)


@pytest.fixture
def start(directory: Directory, tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as exits:

        def started(policy: Policy = POLICY, where: Directory = directory, **options: object) -> Planner:
            planner = Planner(policy, MODEL, where, tmp_path / "models", **options)  # type: ignore[arg-type]
            planner.start()
            exits.callback(planner.close)
            return planner

        yield started


def send(directory: Directory, some: list[LoadStep], gateway: str = "g") -> None:
    for first in range(0, len(some), 20):
        load_stream.send(directory, LoadMessage.of(gateway, SHAPE, some[first : first + 20], dropped=0))


def published(directory: Directory) -> LoadForecast | None:
    document = directory.read(forecast.DOCUMENT)
    return None if document is None else forecast.decode(document)


def seen(directory: Directory, steps: int) -> bool:
    found = published(directory)
    return found is not None and found.steps == steps


def test_it_forecasts_what_is_streamed(directory: Directory, start: Start, steps: list[LoadStep]) -> None:
    start()
    send(directory, steps[:100])
    eventually(lambda: seen(directory, 100), 20, "it has seen what there is")
    found = published(directory)
    assert found is not None
    assert (found.gateways, found.model, found.horizon_s) == (["g"], 0, 1.0)
    assert [layer.layer for layer in found.layers] == list(SHAPE.layers)
    assert all(len(layer.expected) == SHAPE.experts and sum(layer.expected) > 0 for layer in found.layers)
    assert all(p90 >= rows for layer in found.layers for p90, rows in zip(layer.p90, layer.expected, strict=True))


def test_forecasts_are_shown_beside_what_came(directory: Directory, start: Start, steps: list[LoadStep]) -> None:
    start()
    send(directory, steps[:100])
    eventually(lambda: seen(directory, 100), 20, "it has forecast")
    send(directory, steps[100:140])
    eventually(lambda: seen(directory, 140), 20, "the horizon has passed")
    found = published(directory)
    assert found is not None
    assert all(layer.error is not None and 0 <= layer.error <= 1 for layer in found.layers)
    assert all(sum(layer.actual) > 0 for layer in found.layers)


def test_it_trains_from_the_stream_and_uses_what_it_learned(
    directory: Directory, start: Start, steps: list[LoadStep], tmp_path: Path
) -> None:
    start(retrain=RetrainPolicy(first_after=2000))
    send(directory, steps)

    def trained() -> bool:
        found = published(directory)
        return found is not None and found.model == 1

    eventually(trained, 120, "a predictor is trained")
    found = published(directory)
    assert found is not None
    assert found.trained_steps >= 2000
    assert all("validation" in layer.reason for layer in found.layers)
    assert storage.versions(tmp_path / "models") == [1]


def test_a_planner_that_starts_again_goes_on_with_stream_and_model(
    directory: Directory, start: Start, steps: list[LoadStep], tmp_path: Path
) -> None:
    training = Training(tmp_path / "models", POLICY.predictor.horizon_s)
    training.start([stack(SHAPE, steps)])
    eventually(lambda: training.ended() is True, 120, "a predictor is trained")
    send(directory, steps[:60])
    start()
    eventually(lambda: seen(directory, 60), 20, "what was streamed before is known")
    found = published(directory)
    assert found is not None
    assert found.model == 1


def test_several_gateways_are_followed(directory: Directory, start: Start, steps: list[LoadStep]) -> None:
    start()
    send(directory, steps[:40])
    send(directory, steps[:20], gateway="another")  # its clock is its own
    eventually(lambda: seen(directory, 60), 20, "both are followed")
    found = published(directory)
    assert found is not None
    assert found.gateways == ["g", "another"]


def test_garbage_is_left_out(directory: Directory, start: Start, steps: list[LoadStep]) -> None:
    planner = start()
    directory.append(load_stream.STREAM, b"garbage", keep=100)
    message = LoadMessage.of("g", SHAPE, steps[:5], dropped=0)
    message.columns.pop("waiting")
    load_stream.send(directory, message)
    send(directory, steps[:20])
    eventually(lambda: seen(directory, 20), 20, "what can be read is followed")
    assert planner.alive


def test_a_redis_that_goes_away_and_comes_back(steps: list[LoadStep], start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    with RedisServer(folder) as server:
        directory = Directory(server.url, "n")
        planner = start(where=directory)
        send(directory, steps[:20])
        eventually(lambda: seen(directory, 20), 20, "it is followed")
    assert planner.alive
    with RedisServer(folder):
        send(directory, steps[20:60])
        eventually(lambda: (published(directory) or forecast_of(0)).steps >= 40, 30, "it is followed again")


def forecast_of(steps: int) -> LoadForecast:
    return LoadForecast(
        made_at=0.0, horizon_s=1.0, gateways=[], steps=steps, model=0, trained_steps=0, training="", layers=[]
    )


def test_what_is_remembered_is_bounded(steps: list[LoadStep], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.planner.training._MOST_STEPS", 100)
    memory = Memory()
    for first in range(0, 300, 20):
        memory.add("g", stack(SHAPE, steps[first : first + 20]))
    [records] = memory.recordings()
    assert len(records) == 100
    assert records.time_s[-1] == steps[299].time_s


def test_gateways_are_recordings_of_their_own(steps: list[LoadStep]) -> None:
    memory = Memory()
    for gateway in ("a", "a", "b"):
        memory.add(gateway, stack(SHAPE, steps[:20]))
    assert [len(records) for records in memory.recordings()] == [40, 20]


def test_too_little_to_learn_from_is_no_new_version(
    steps: list[LoadStep], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = Training(tmp_path / "models", 1.0)
    training.start([stack(SHAPE, steps[:50])])
    eventually(lambda: training.ended() is False, 60, "it ends, and brings nothing")
    assert "too few" in caplog.text
    assert storage.versions(tmp_path / "models") == []


def test_a_training_can_be_ended(steps: list[LoadStep], tmp_path: Path) -> None:
    training = Training(tmp_path / "models", 1.0)
    training.start([stack(SHAPE, steps)])
    training.close()
    assert not training.busy
