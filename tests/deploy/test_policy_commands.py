"""`evermoe policy`: files checked and explained, every mistake in a line of its own, schemas for editors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jsonschema
import pytest

from deploy import cli
from deploy.models import DEFAULT_MODEL, ensure_store


@pytest.fixture
def evermoe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):  # type: ignore[no-untyped-def]
    """Run the command; its exit code, what it printed, and the lines of its errors."""
    monkeypatch.setenv("EVERMOE_CACHE", str(tmp_path / "cache"))

    def run(*arguments: str) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["evermoe", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return int(ended.value.code or 0), said.out, said.err.splitlines()

    return run


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "policy.yaml"


def test_the_schema_is_json_and_judges_files(evermoe) -> None:  # type: ignore[no-untyped-def]
    code, said, _ = evermoe("policy", "schema")
    assert code == 0
    judge = jsonschema.Draft202012Validator(json.loads(said))
    assert judge.is_valid({"planner": {"method": "eplb"}})
    assert not judge.is_valid({"planner": {"method": "best"}})


def test_a_valid_file_is_explained(evermoe, file: Path) -> None:  # type: ignore[no-untyped-def]
    file.write_text("experts: {unit: {experts: 2}, max_replicas: 3}\n")
    code, said, _ = evermoe("policy", "check", str(file))
    assert code == 0
    assert f"{file} is valid (with --model" in said
    ensure_store(DEFAULT_MODEL)
    code, said, _ = evermoe("policy", "check", str(file), "--model", str(DEFAULT_MODEL))
    assert code == 0
    assert "evermoe-tiny: 4 MoE layers x 8 experts are 32 slices of 0.375 MiB in 4 units of up to 8 slices" in said
    assert "all together 12 MiB to start with, 12 MiB at most (experts.replicas; planner.memory_mib raises it)" in said


def test_every_mistake_has_a_line(evermoe, file: Path) -> None:  # type: ignore[no-untyped-def]
    file.write_text("experts: {max_replicas: 0}\nplaner: {}\ngateway: {inline: [sometimes]}\n")
    code, said, errors = evermoe("policy", "check", str(file))
    assert (code, said) == (2, "")
    assert errors == [
        f"error: {file}: experts.max_replicas: should be greater than or equal to 1 (got 0)",
        f"error: {file}: gateway.inline: should be 'fallback', 'prefer' or 'never' (got ['sometimes'])",
        f"error: {file}: unknown key 'planer': did you mean 'planner'?",
    ]


def test_what_the_model_lacks_is_refused(evermoe, file: Path) -> None:  # type: ignore[no-untyped-def]
    ensure_store(DEFAULT_MODEL)
    file.write_text("overrides: [{experts: [8], pin: true}]\nplanner: {memory_mib: 0.1}\n")
    code, _, errors = evermoe("policy", "check", str(file), "--model", str(DEFAULT_MODEL))
    assert code == 2
    assert [line.split(": ")[2] for line in errors] == ["overrides.0.experts", "planner.memory_mib"]


def test_a_model_that_is_not_prepared_is_named(evermoe, file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file.write_text("{}\n")
    code, _, errors = evermoe("policy", "check", str(file), "--model", str(tmp_path / "nowhere"))
    assert code == 2
    assert "nowhere: is not prepared yet" in errors[0]


def test_resources_that_this_host_lacks_are_noted_and_do_not_start(evermoe, file: Path) -> None:  # type: ignore[no-untyped-def]
    file.write_text("experts: {resources: {cpu: 100000, custom: {fpga: 1}}}\n")
    code, said, _ = evermoe("policy", "check", str(file))
    assert code == 0
    assert "not for a cluster of this host alone: experts.resources.cpu: 100000 for a replica" in said
    code, _, errors = evermoe("serve", "--policy", str(file))
    assert code == 2
    assert len(errors) == 2
    assert "experts.resources.custom.fpga" in errors[1]


@pytest.mark.parametrize("command", ["apply", "show"])
def test_a_service_that_is_not_there_is_named(evermoe, file: Path, command: str) -> None:  # type: ignore[no-untyped-def]
    file.write_text("{}\n")
    arguments = [str(file)] if command == "apply" else []
    code, _, errors = evermoe("policy", command, *arguments, "--url", "http://127.0.0.1:1")
    assert code == 2
    assert "http://127.0.0.1:1" in errors[0]
