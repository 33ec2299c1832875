"""Scenarios: what they say, what is refused, and that deeds are done and undone."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recovery.chaos.deeds import check_device, done
from recovery.chaos.play import _chosen
from recovery.chaos.scenario import EventPlan, ScenarioError, load_scenario, parse_scenario
from recovery.chaos.service import Service, Target
from tests.waiting import eventually

KILL = {"at": 1, "do": "kill", "to": "expert"}
SCENARIOS = sorted((Path(__file__).parents[2] / "recovery" / "scenarios").glob("*.yaml"))


@pytest.mark.parametrize("file", SCENARIOS, ids=lambda file: file.stem)
def test_the_scenarios_in_the_box_can_be_read(file: Path) -> None:
    scenario = load_scenario(file)
    assert scenario.name == file.stem
    assert scenario.schedule()


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("nothing", "a scenario is a mapping"),
        ({"events": []}, "events"),
        ({"events": [KILL], "sed": 1}, "unknown key 'sed': did you mean 'seed'?"),
        ({"events": [{**KILL, "evry": 1}]}, "did you mean 'every'?"),
        ({"events": [{"at": 1, "do": "explode"}]}, r"events\.0\.do"),
        ({"events": [{"at": 1, "do": "kill"}]}, "say `to` whom: expert, gateway"),
        ({"events": [{"at": 1, "do": "corrupt", "to": "redis"}]}, "data port"),
        ({"events": [{**KILL, "count": 0}]}, "above 0"),
        ({"events": [{**KILL, "at": 99}]}, "comes after the end"),
        ({"events": [{"at": 1, "do": "partition"}]}, "can't be cut: give the network `device`"),
        ({"events": [KILL], "load": {"streams": 0}}, r"load\.streams"),
    ],
)
def test_a_bad_scenario_is_refused_in_one_line(document: Any, says: str) -> None:
    with pytest.raises(ScenarioError, match=says) as caught:
        parse_scenario(document, "mine.yaml")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("mine.yaml: ")


def test_the_command_refuses_in_one_line_with_exit_code_2(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("events: [{at: 1, do: kill, to: nobody}]")
    for arguments, says in (
        ([str(file)], "events.0.to"),
        ([str(tmp_path / "none.yaml")], "can't be read"),
        ([str(SCENARIOS[0]), "--url", "http://127.0.0.1:9"], "does not answer"),
        ([str(SCENARIOS[0]), "--url", "nowhere"], "no URL"),
    ):
        ended = subprocess.run(
            [sys.executable, "-m", "deploy.cli", "chaos", *arguments], capture_output=True, text=True, check=False
        )
        assert ended.returncode == 2
        assert says in ended.stderr
        assert ended.stderr.count("\n") == 1


def test_a_schedule_repeats_and_depends_on_the_seed_only() -> None:
    document = {"seconds": 5, "events": [{**KILL, "every": 1.5}, {"at": 2, "do": "stop", "to": "gateway"}]}
    one, same = parse_scenario(document, "a"), parse_scenario(document, "a")
    assert [moment.at for moment in one.schedule()] == [1, 2, 2.5, 4]
    assert one.schedule() == same.schedule()
    other = parse_scenario({**document, "seed": 1}, "a")
    assert [moment.draw for moment in other.schedule()] != [moment.draw for moment in one.schedule()]


@given(st.integers(0, 20), st.integers(1, 30), st.floats(0, 1, exclude_max=True))
def test_as_many_as_asked_for_are_hit_each_once(there: int, count: int, draw: float) -> None:
    targets = [Target("expert", str(number), number) for number in range(there)]
    hit = _chosen(targets, count, draw)
    assert len(hit) == len(set(hit)) == min(there, count)
    assert _chosen(targets, "all", draw) == targets


@pytest.fixture
def victim() -> Iterator[psutil.Process]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        yield psutil.Process(process.pid)
        with contextlib.suppress(ProcessLookupError):
            process.kill()


def event(**wishes: Any) -> EventPlan:
    return EventPlan.model_validate({"at": 0, "to": "expert", **wishes})


def test_a_stopped_process_goes_on_afterwards(victim: psutil.Process) -> None:
    with done(event(do="stop"), [Target("expert", "v", victim.pid)], 0.5):
        eventually(lambda: victim.status() == psutil.STATUS_STOPPED)
    eventually(lambda: victim.status() != psutil.STATUS_STOPPED)


def test_a_slowed_process_gets_its_part_of_the_time(victim: psutil.Process) -> None:
    target = [Target("expert", "v", victim.pid)]
    with done(event(do="slow", factor=10.0), target, 0.5):
        for stopped in (True, False, True):
            eventually(lambda now=stopped: (victim.status() == psutil.STATUS_STOPPED) is now)  # type: ignore[misc]
    eventually(lambda: victim.status() != psutil.STATUS_STOPPED)


def test_a_killed_process_is_dead_and_killing_it_again_harmless(victim: psutil.Process) -> None:
    for _ in range(2):
        with done(event(do="kill"), [Target("expert", "v", victim.pid)], 0.5):
            pass
    eventually(lambda: not victim.is_running() or victim.status() == psutil.STATUS_ZOMBIE)


def test_a_device_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(ScenarioError, match=r"no network device 'veth99' here: this host has .*lo"):
        check_device(event(do="partition", to=None, device="veth99"))
    with pytest.raises(ScenarioError, match="loopback"):
        check_device(event(do="partition", to=None, device="lo"))


def test_a_service_that_is_not_there_is_said() -> None:
    with pytest.raises(ScenarioError, match="start it with `evermoe serve`"):
        Service("http://127.0.0.1:9")
