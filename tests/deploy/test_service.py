"""`evermoe serve` as a user runs it: a real process, a real cluster, real replicas killed with SIGKILL."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from predictor.records import read_records
from tests.deploy.served import EVERMOE, PROMPT, Served, serving
from tests.waiting import eventually

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(os.path.realpath(tmp_path_factory.mktemp("s"))) / "record.parquet"


@pytest.fixture(scope="module")
def served(record: Path) -> Iterator[Served]:
    with serving(record.parent, "--record", str(record)) as running:
        yield running


def test_it_answers_before_replicas_are_up_and_with_them_alike(served: Served) -> None:
    early = served.stream(32)
    served.wait_for_replicas()
    eventually(lambda: served.calls().get("replica", 0) > 0 or not served.stream(4), 30, "replicas are used")
    assert served.stream(32) == early
    assert served.calls()["replica"] > 0


def test_killing_every_replica_in_the_middle_of_a_stream_changes_no_token(served: Served) -> None:
    served.wait_for_replicas()
    expected = served.stream(150)
    before = served.calls().get("inline", 0)
    pids = [replica["pid"] for unit in served.status()["units"] for replica in unit["replicas"]]

    def kill(number: int) -> None:
        if number == 20:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

    assert served.stream(150, kill) == expected
    assert served.calls()["inline"] > before
    eventually(lambda: served.ready() == 8 and not pids_of(served) & set(pids), 120, "Serve replaces the replicas")
    assert served.stream(150) == expected


def pids_of(served: Served) -> set[int]:
    return {replica["pid"] for unit in served.status()["units"] for replica in unit["replicas"]}


def test_replicas_that_hang_change_no_token(served: Served) -> None:
    served.wait_for_replicas()
    expected = served.stream(60)
    pids = pids_of(served)

    def stop(number: int) -> None:
        if number == 10:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)

    try:
        assert served.stream(60, stop) == expected
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_chat_and_model_listing_work_with_the_official_client(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["evermoe-tiny"]
    answer = served.client.chat.completions.create(
        model="evermoe-tiny", messages=[{"role": "user", "content": "Who are you?"}], max_tokens=16, seed=1
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 16
    with pytest.raises(openai.NotFoundError, match="nobody"):
        served.client.completions.create(model="nobody", prompt="x")


def test_malformed_json_is_a_clear_400(served: Served) -> None:
    answer = httpx.post(f"{served.url}/v1/completions", content=b"{oops", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_status_shows_every_expert(served: Served) -> None:
    command = [EVERMOE, "status", "--url", served.url]
    wide = {**os.environ, "COLUMNS": "160"}
    table = subprocess.run(command, capture_output=True, text=True, check=True, env=wide).stdout
    assert all(re.search(rf"expert-{e} .* cpu .* 4/4 ", table) for e in range(8)), table
    report = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert [unit["unit"] for unit in report["units"]] == [f"expert-{e}" for e in range(8)]


def forecast_of(served: Served) -> dict[str, Any]:
    return dict(served.status()["forecast"] or {})


def planners(served: Served) -> list[psutil.Process]:
    children = psutil.Process(served.process.pid).children(recursive=True)
    return [child for child in children if "ServeReplica:evermoe:planner" in " ".join(child.cmdline())]


def test_the_forecast_is_shown_beside_what_came(served: Served) -> None:
    def judged() -> bool:
        served.stream(60)
        layers = forecast_of(served).get("layers", [])
        return bool(layers) and all(layer["error"] is not None and sum(layer["actual"]) > 0 for layer in layers)

    eventually(judged, 120, "forecasts are judged")
    assert len(forecast_of(served)["layers"]) == 4
    command = [EVERMOE, "status", "--url", served.url]
    wide = {**os.environ, "COLUMNS": "160"}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=wide).stdout
    assert re.search(r"forecast of the next 3 s .* no trained predictor yet", said), said
    metrics = httpx.get(f"{served.url}/metrics").text
    errors = re.findall(r'evermoe:forecast_error_ratio\{layer="(\d)",model_name="evermoe-tiny"\} (\S+)', metrics)
    assert [layer for layer, _ in errors] == list("0123")
    assert all(0 <= float(error) <= 1 for _, error in errors)


def test_without_its_planner_everything_serves_on(served: Served) -> None:
    expected = served.stream(60)
    eventually(lambda: len(planners(served)) == 1, 60, "there is a planner")
    [planner] = planners(served)
    planner.kill()
    planner.wait(20)
    assert served.stream(60) == expected
    before = forecast_of(served)["made_at"]
    eventually(lambda: forecast_of(served)["made_at"] > before, 90, "another planner forecasts")
    assert forecast_of(served)["steps"] > 60  # the stream tells it what was before


def named(served: Served, title: str) -> psutil.Process:
    """The one process of the service that has `title` in its command line."""
    children = psutil.Process(served.process.pid).children(recursive=True)
    [found] = [child for child in children if title in " ".join(child.cmdline())]
    return found


def gateway_pid(served: Served) -> int:
    return int(served.status()["gateways"][0]["pid"])


def test_a_stream_goes_on_when_the_only_gateway_is_killed(served: Served) -> None:
    expected = served.stream(120)
    before = gateway_pid(served)

    def kill(number: int) -> None:
        if number == 20:
            os.kill(before, signal.SIGKILL)

    assert served.stream(120, kill) == expected
    assert gateway_pid(served) != before


@pytest.mark.parametrize("title", ["redis-server", "ServeController"])
def test_without_what_only_directs_everything_serves_on_and_is_whole_again(served: Served, title: str) -> None:
    served.wait_for_replicas()
    expected, pids = served.stream(100), pids_of(served)

    def kill(number: int) -> None:
        if number == 10:
            named(served, title).kill()

    assert served.stream(100, kill) == expected
    eventually(lambda: pids_of(served) == pids, 30, "every replica is in the directory, and the same as before")
    assert served.stream(100) == expected


def test_an_answer_outlives_its_api_process_for_a_client_with_a_key(served: Served) -> None:
    body = {"model": "evermoe-tiny", "prompt": PROMPT, "max_tokens": 400, "seed": 9, "stream": True, "ignore_eos": True}
    headers = {"Idempotency-Key": "once"}
    expected = "".join(texts(httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).text.splitlines()))
    got = ""
    with (
        contextlib.suppress(httpx.TransportError),
        httpx.stream("POST", f"{served.url}/v1/completions", json=body, headers=headers, timeout=60) as answer,
    ):
        for number, text in enumerate(texts(answer.iter_lines())):
            got += text
            if number == 100:
                named(served, "ServeReplica:evermoe:api").kill()
    assert expected.startswith(got)
    assert got != expected
    eventually(served._healthy, 60, "the api is back")
    again = httpx.post(f"{served.url}/v1/completions", json=body, headers=headers, timeout=60)
    chunks = list(texts(again.text.splitlines()))
    assert "".join(chunks) == expected
    assert len(chunks[0]) > len(got) / 2, "what there was comes at once"


def texts(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))["choices"][0]["text"]


def test_chaos_reports_pauses_and_nothing_else(served: Served, tmp_path: Path) -> None:
    served.wait_for_replicas()
    scenario, report = tmp_path / "short.yaml", tmp_path / "report.json"
    scenario.write_text(
        "seconds: 8\nload: {streams: 2, max_tokens: 60, requests: 4}\nevents:\n"
        "  - {at: 1, do: kill, to: expert}\n  - {at: 2, do: stop, to: expert, seconds: 1}\n"
        "  - {at: 4, do: corrupt, to: expert, count: all}\n  - {at: 5, do: kill, to: gateway}\n"
    )
    command = [EVERMOE, "chaos", str(scenario), "--url", served.url, "--out", str(report)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    kept = json.loads(report.read_text())
    assert [happening["what"] for happening in kept["happenings"]] == [
        "kill expert", "stop expert", "corrupt expert", "kill gateway"]  # fmt: skip
    assert kept["errors"] == []
    assert kept["changed"] == 0
    assert kept["happenings"][3]["whole_after_s"] is not None


def test_interrupting_it_lets_requests_finish_and_leaves_nothing_behind(served: Served, record: Path) -> None:
    """Last in this file: it ends the service."""
    expected = served.stream(100)
    mine = psutil.Process(served.process.pid).children(recursive=True)
    assert len(mine) > 8
    refused: list[httpx.Response] = []

    def interrupt(number: int) -> None:
        if number == 10:
            served.process.send_signal(signal.SIGTERM)
            eventually(lambda: httpx.get(f"{served.url}/health").status_code == 503, 20, "new requests are refused")
            refused.append(httpx.post(f"{served.url}/v1/completions", json={"prompt": "x"}))

    assert served.stream(100, interrupt) == expected
    assert refused[0].status_code == 503
    assert refused[0].json()["error"]["code"] == "shutting_down"
    assert int(refused[0].headers["retry-after"]) > 0
    assert served.process.wait(60) == 0, served.output.read_text()
    assert "Traceback" not in served.output.read_text()
    assert len(read_records(record)) > 500
    _, alive = psutil.wait_procs(mine, timeout=20)
    assert alive == []
    assert list(served.temporary.iterdir()) == []
    leftovers = [name for name in os.listdir("/dev/shm") if "evermoe" in name or str(served.process.pid) in name]
    assert leftovers == []
    sockets = Path("/proc/net/unix").read_text()
    assert str(served.temporary) not in sockets
