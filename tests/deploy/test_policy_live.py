"""A policy is applied to a running service, as an operator does it; requests notice nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.deploy.served import EVERMOE, Served
from tests.waiting import eventually

START = "experts: {unit: {experts: 4}, replicas: 0}\ngateway: {compile: false, max_running: 4}\n"

pytestmark = pytest.mark.ray


class Service(Served):
    """A running `evermoe serve`, and an operator at its terminal."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "policy.yaml"
        self.file.write_text(START)
        super().__init__(folder, "--policy", str(self.file))

    def replicas(self) -> list[int]:
        return [unit["ready"] for unit in self.status()["units"]]

    def run(self, *arguments: str) -> tuple[int, str, list[str]]:
        """An `evermoe policy` command: exit code, output, errors."""
        done = subprocess.run([EVERMOE, "policy", *arguments, "--url", self.url], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr.splitlines()

    def apply(self, more: str) -> str:
        self.file.write_text(START + more)
        code, said, errors = self.run("apply", str(self.file))
        assert code == 0, errors
        return said

    def complete(self, count: int = 8) -> httpx.Response:
        body = {"model": "evermoe-tiny", "prompt": "def add(", "max_tokens": count, "temperature": 0}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def text(self) -> str:
        answer = self.complete()
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    running = Service(Path(os.path.realpath(tmp_path_factory.mktemp("s"))))
    try:
        running.wait()
        yield running
    finally:
        running.close()


def test_the_policy_it_runs_is_shown_as_a_file(service: Service) -> None:
    code, said, _ = service.run("show")
    assert code == 0
    assert said.startswith("# evermoe-tiny: policy version 1, of ")
    assert [line.split() for line in said.splitlines()[1:] if "#" in line] == [
        ["experts:", "4", "#", "default:", "1"], ["replicas:", "0", "#", "default:", "1"],
        ["max_running:", "4", "#", "default:", "64"], ["compile:", "false", "#", "default:", "true"],
    ]  # fmt: skip


def test_bounds_are_obeyed_without_a_restart(service: Service) -> None:
    expected = service.text()
    assert service.replicas() == [0, 0]
    said = service.apply("overrides: [{experts: [0], min_replicas: 2}]\n")
    assert "overrides  [] -> [{experts: [0], min_replicas: 2}]" in said
    assert "is applied" in said
    eventually(lambda: service.replicas()[0] == 2, 120, "replicas that the override asks for")
    assert service.text() == expected
    service.apply("overrides: [{experts: [0], max_replicas: 1, pin: true}]\n")
    eventually(lambda: service.replicas()[0] == 1, 60, "no more replicas than the override allows")
    assert service.text() == expected


def test_the_gateway_goes_by_it_from_the_next_step_on(service: Service) -> None:
    expected = service.text()
    service.file.write_text(START.replace("max_running: 4", "max_running: 4, inline: prefer, max_waiting: 0"))
    assert service.run("apply", str(service.file))[0] == 0
    report = service.status()
    assert report["gateways"][0]["policy_version"] == report["policy"]["version"]
    assert service.text() == expected
    with ThreadPoolExecutor(12) as clients:
        answers = [answer.status_code for answer in clients.map(lambda _: service.complete(200), range(12))]
    assert set(answers) == {200, 429}, "nobody waits"
    service.apply("")
    with ThreadPoolExecutor(12) as clients:
        assert {answer.status_code for answer in clients.map(lambda _: service.complete(), range(12))} == {200}


def test_wrong_files_change_nothing(service: Service) -> None:
    before = service.run("show")[1]
    for text, said in {
        "experts: {replicas: -1, unit: {experts: 4}}": "experts.replicas: should be greater than or equal to 0",
        "planner: {imbalance: 2}\noverrides: [{experts: [8], pin: true}]": "evermoe-tiny has no expert 8: it has 0-7",
        "planner: {imbalance: 2}\nexperts: {unit: {experts: 2}}": "experts.unit.experts: 4 -> 2 needs a restart",
        "planner: {imbalance: 2}\ngateway: {threads: 1}": "nothing was applied",
    }.items():
        service.file.write_text(text)
        code, out, errors = service.run("apply", str(service.file))
        assert (code, out) == (2, "")
        assert any(said in line for line in errors), errors
        assert all(line.startswith(f"error: {service.file}: ") for line in errors)
    assert service.run("show")[1] == before


def test_a_pool_of_warm_workers_is_kept(service: Service) -> None:
    service.apply("planner: {warm_pool: 1}\n")
    eventually(lambda: service.status()["warm_pool"] == {"wanted": 1, "ready": 1}, 120, "a worker is warm")
    service.apply("planner: {warm_pool: 0}\n")
    eventually(lambda: service.status()["warm_pool"] == {"wanted": 0, "ready": 0}, 30, "it is let go")
