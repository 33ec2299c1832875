"""The command line: what is wrong is said in one line with the remedy, exit code 2, no traceback, nothing started."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest

from deploy import cli
from deploy.models import DEFAULT_MODEL
from experts.store import prepare
from tests.checkpoints import write_checkpoint


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray must not even be reached; caches lie in the test's folder."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started for bad input")

    monkeypatch.setattr("deploy.launcher._start_ray", refuse)
    monkeypatch.setenv("EVERMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("REDIS_URL", raising=False)


@pytest.fixture
def checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = write_checkpoint("qwen3_moe", tmp_path / "checkpoint")
    capsys.readouterr()  # transformers' progress bar
    return path


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command; the one line it prints on stderr before it exits with 2."""
    monkeypatch.setattr(sys, "argv", ["evermoe", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    output = capsys.readouterr().err
    assert "Traceback" not in output
    lines = output.strip().splitlines()
    assert len(lines) == 1, output
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    return lambda *arguments: refused(monkeypatch, capsys, *arguments)


COMMANDS = (["prepare", "{model}", "{store}"], ["serve", "{model}"])


@pytest.fixture(params=COMMANDS, ids=["prepare", "serve"])
def refuse_model(request: pytest.FixtureRequest, refuse, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Refuse a model in `evermoe prepare` and in `evermoe serve` alike."""
    store = tmp_path / "store"
    return lambda model: refuse(*[part.format(model=model, store=store) for part in request.param])


def test_a_missing_checkpoint(refuse_model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert str(tmp_path / "nowhere") in refuse_model(tmp_path / "nowhere")


def test_a_truncated_checkpoint(refuse_model, checkpoint: Path) -> None:  # type: ignore[no-untyped-def]
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors" in refuse_model(checkpoint)


def rename(checkpoint: Path, family: str, architecture: str) -> None:
    """Let the checkpoint say that it is of another family."""
    config = json.loads((checkpoint / "config.json").read_text())
    changed = {**config, "model_type": family, "architectures": [architecture]}
    (checkpoint / "config.json").write_text(json.dumps(changed))


def test_a_model_without_experts(refuse_model, checkpoint: Path) -> None:  # type: ignore[no-untyped-def]
    rename(checkpoint, "qwen3", "Qwen3ForCausalLM")
    assert "expert" in refuse_model(checkpoint).lower()


def test_a_family_that_is_not_supported(refuse_model, checkpoint: Path) -> None:  # type: ignore[no-untyped-def]
    rename(checkpoint, "dbrx", "DbrxForCausalLM")
    assert "dbrx" in refuse_model(checkpoint).lower()


def test_a_damaged_store(refuse, checkpoint: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = prepare(checkpoint, tmp_path / "made").path
    file = store / "experts" / "1.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    message = refuse("serve", str(store))
    assert str(file) in message
    assert "evermoe prepare" in message


def test_an_unknown_policy_key(refuse, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "policy.yaml"
    file.write_text("experts: {replica: 2}\n")
    assert f"{file}: unknown key 'experts.replica': did you mean 'replicas'?" in refuse("serve", "--policy", str(file))


def test_a_port_in_use(refuse) -> None:  # type: ignore[no-untyped-def]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} on 127.0.0.1 can't be used" in refuse("serve", "--port", str(port))


def test_a_host_that_is_not_ours(refuse) -> None:  # type: ignore[no-untyped-def]
    assert "192.0.2.1" in refuse("serve", "--host", "192.0.2.1")


def test_a_redis_that_does_not_answer(refuse, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1")
    assert "REDIS_URL" in refuse("serve")


def test_a_redis_url_that_is_none(refuse, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("REDIS_URL", "localhost")
    assert "localhost" in refuse("serve")


def test_an_unknown_dtype(refuse, checkpoint: Path) -> None:  # type: ignore[no-untyped-def]
    assert "int3" in refuse("serve", str(checkpoint), "--dtype", "int3")


def test_a_record_that_can_not_be_written(refuse, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "nowhere" / "record"
    for command in (["record", str(file)], ["serve", "--record", str(file)]):
        assert f"{file} can't be written" in refuse(*command)


def test_a_record_of_an_unknown_profile(refuse, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "prefill-heavy, decode-heavy, mixed" in refuse("record", str(tmp_path / "x"), "--profile", "busy")


def test_a_record_of_a_mix_that_is_none(refuse, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "code=3,chat=1" in refuse("record", str(tmp_path / "x"), "--mix", "code:3")


def test_a_record_of_a_model_that_is_not_there(refuse, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "nowhere" in refuse("record", str(tmp_path / "x"), "--model", str(tmp_path / "nowhere"))


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense"])
def test_status_of_a_service_that_is_not_there(refuse, url: str) -> None:  # type: ignore[no-untyped-def]
    assert url in refuse("status", "--url", url)


def test_prepare_says_what_it_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = shutil.copytree(DEFAULT_MODEL, tmp_path / "copy")
    monkeypatch.setattr(sys, "argv", ["evermoe", "prepare", str(copy), str(tmp_path / "store")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = " ".join(capsys.readouterr().out.split())
    assert "Qwen3MoeForCausalLM, 4 MoE layers x 8 experts top-2, bfloat16" in said
