"""`evermoe replay` from the command line to the report, against a server in another thread."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy import cli
from replay.outcome import read_outcomes
from tests.replay.completion_server import CompletionServer, as_asked, serving, tokens
from tests.replay.conftest import BURSTGPT, MOONCAKE

TEXTS = {"code": "def add(a, b): return a + b\n" * 400, "chat": "so he said that " * 700}


@contextmanager
def running(server: CompletionServer) -> Iterator[CompletionServer]:
    """`server`, in an event loop of its own."""
    loop = asyncio.new_event_loop()
    started, ended = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with serving(server):
            started.set()
            await ended.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert started.wait(10)
        yield server
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()


@pytest.fixture(autouse=True)
def _own_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.replaying.plain_texts", lambda characters: TEXTS)
    monkeypatch.setattr("deploy.replaying.go_first", lambda: None)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text(MOONCAKE)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trace: Path, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Replay the trace; exit code, and what was printed on stdout and stderr."""

    def replay(url: str, *arguments: object, out: Path | None = None) -> tuple[int, str, str]:
        options = ["--url", url, "--out", str(out or tmp_path / "out"), "--speed", "20", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["evermoe", "replay", str(trace), *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), " ".join(printed.out.split()), " ".join(printed.err.split())

    return replay


def test_a_trace_is_played_and_reported(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with running(CompletionServer()) as server:
        code, said, _ = run(server.url + "/v1/", "--slo", "ttft=5s", "--api-key", "secret")
    assert code == 0
    assert "any: 4 requests sent" in said
    assert "goodput: " in said
    assert server.keys == {"Bearer secret"}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"requests.jsonl", "summary.json", "report.html", "load.png", "latency.png", "timeline.png"}
    outcomes = read_outcomes(tmp_path / "out" / "requests.jsonl")
    assert {(o.index, o.prompt_tokens, o.tokens) for o in outcomes} == {
        (0, 1100, 6),
        (1, 600, 4),
        (2, 28, 445),
        (3, 1030, 3),
    }
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["good_part"], summary["complete"], summary["prompts"]) == (1.0, True, "token ids")
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".png")


def test_shared_prefixes_are_shared(run) -> None:  # type: ignore[no-untyped-def]
    with running(CompletionServer()) as server:
        run(server.url)
    prompts = {len(body["prompt"]): body["prompt"] for body in server.bodies}
    assert prompts[1100][:512] == prompts[600][:512] == prompts[1030][:512]
    assert prompts[1100][:1024] == prompts[1030][:1024]
    assert prompts[1100][512:600] != prompts[600][512:600]


def test_servers_that_know_no_tokens_get_text_of_that_length(run) -> None:  # type: ignore[no-untyped-def]
    """This server finds seven tokens in every prompt, also in the sample that is counted."""
    with running(CompletionServer(tokenizes=False)) as server:
        assert run(server.url, "--limit", 3)[0] == 0
    assert all(isinstance(body["prompt"], str) for body in server.bodies)
    assert max(len(body["prompt"]) for body in server.bodies) == pytest.approx(1100 * 1000 / 7, rel=0.01)


def test_text_can_be_asked_for(run) -> None:  # type: ignore[no-untyped-def]
    with running(CompletionServer()) as server:
        run(server.url, "--text", "--limit", 1)
    assert isinstance(server.bodies[0]["prompt"], str)


def test_failures_of_the_trace_are_not_sent(run, trace: Path) -> None:  # type: ignore[no-untyped-def]
    trace.write_text(BURSTGPT)
    with running(CompletionServer()) as server:
        code, said, _ = run(server.url, "--speed", 1000)
    assert code == 0
    assert "3 requests sent" in said
    assert len(server.bodies) == 3


def test_long_requests_are_shortened_to_the_context(run) -> None:  # type: ignore[no-untyped-def]
    with running(CompletionServer(models=[{"id": "small", "max_model_len": 256}])) as server:
        _, said, _ = run(server.url)
    assert "4 requests were shortened to the model's context" in said
    assert all(len(body["prompt"]) + body["max_tokens"] <= 256 for body in server.bodies)


def test_ctrl_c_reports_what_was_done(trace: Path, tmp_path: Path) -> None:
    with running(CompletionServer(tokens(3, gap_s=0.01))) as server:
        command = [
            sys.executable,
            "-m",
            "deploy.cli",
            "replay",
            str(trace),
            "--url",
            server.url,
            "--out",
            str(tmp_path / "out"),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while len(server.arrivals) < 3:
            assert process.poll() is None, process.communicate()
            threading.Event().wait(0.05)
        threading.Event().wait(0.3)
        process.send_signal(signal.SIGINT)
        said, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert "Stopped: 3 of 4 requests had been sent." in said
    assert "3 requests sent" in said
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_replay_is_never_written_over(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with running(CompletionServer(as_asked)) as server:
        assert run(server.url, "--limit", 1)[0] == 0
        code, _, told = run(server.url, "--limit", 1)
    assert code == 2
    assert "has a replay already: give another folder" in told
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--url", "localhost:8000"], "--url 'localhost:8000' is no URL"),
        (["--url", "http://127.0.0.1:1"], "http://127.0.0.1:1/v1/models does not answer as it should"),
        (["--slo", "ttft=fast"], "--slo"),
        (["--window", "5d.."], "no request of the trace is left"),
        (["--model", "other"], "model 'other' is not served at"),
    ],
)
def test_what_is_wrong_is_one_line(run, tmp_path: Path, arguments: list[str], sentence: str) -> None:  # type: ignore[no-untyped-def]
    with running(CompletionServer()) as server:
        code, _, told = run(server.url, *arguments)
    assert code == 2
    assert told.startswith("error: ")
    assert sentence in told
    assert not server.bodies
    assert not (tmp_path / "out").exists()


def test_a_malformed_trace_is_refused_before_anything_is_sent(run, trace: Path) -> None:  # type: ignore[no-untyped-def]
    trace.write_text(MOONCAKE + "{}\n")
    with running(CompletionServer()) as server:
        code, _, told = run(server.url, "--strict")
    assert code == 2
    assert f"{trace}:5: " in told
    assert not server.bodies
