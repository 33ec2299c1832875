"""`evermoe trace`: what it says and writes; what is wrong is one line and exit code 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from deploy import cli
from replay.reading import Trace
from replay.trace import requests
from tests.replay.conftest import AZURE_2023, BURSTGPT, MOONCAKE


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run the command; its exit code, and what it printed on stdout and stderr."""

    def run_command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["evermoe", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), " ".join(printed.out.split()), " ".join(printed.err.split())

    return run_command


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE_2023)
    return path


def test_info(run, trace: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, said, _ = run("trace", "info", trace, "--plot", tmp_path / "plot.png")
    assert code == 0
    assert "(azure-2023): 4 requests in 1m00s" in said
    assert "rate: 0.05 requests/s" in said
    assert "coefficient of variation" in said
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_info_for_programs(run, trace: Path) -> None:  # type: ignore[no-untyped-def]
    trace.write_text(BURSTGPT)
    report = json.loads(run("trace", "info", trace, "--json")[1])
    assert (report["format"], report["requests"], report["failed"]) == ("burstgpt", 4, 1)


def test_malformed_rows_are_told_or_refused(run, trace: Path) -> None:  # type: ignore[no-untyped-def]
    trace.write_text(AZURE_2023 + "2023-11-16 18:17:00,-4,4\n")
    code, said, told = run("trace", "info", trace)
    assert code == 0
    assert "4 requests" in said
    assert f"1 of 5 rows left out; the first of them: {trace}:6: ContextTokens is negative: -4" in told
    code, _, told = run("trace", "info", trace, "--strict")
    assert code == 2
    assert told.startswith(f"error: {trace}:6: ContextTokens is negative: -4")


def test_convert_selects(run, trace: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    trace.write_text(MOONCAKE)
    out = tmp_path / "own.jsonl"
    assert run("trace", "convert", trace, out, "--window", "..1s", "--limit", 2)[0] == 0
    assert [row.hash_ids for row in requests(Trace(out))] == [(0, 1, 2), (0, 7)]
    assert not out.with_name("own.jsonl.partial").exists()


def test_convert_sorts(run, trace: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    lines = AZURE_2023.splitlines()
    trace.write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    out = tmp_path / "own.jsonl"
    code, said, told = run("trace", "convert", trace, out, "--sort")
    assert (code, told) == (0, "")
    assert "4 requests" in said


def test_a_failed_conversion_leaves_nothing(run, trace: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    trace.write_text(AZURE_2023 + "rubbish\n")
    assert run("trace", "convert", trace, tmp_path / "own.jsonl", "--strict")[0] == 2
    assert list(tmp_path.iterdir()) == [trace]


def test_make(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    outs = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for out in outs:
        assert run("trace", "make", out, "--hours", 0.2, "--shape", "day,bursty", "--starts-at", 12)[0] == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert Trace(outs[0]).format.name == "evermoe"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["info", "{folder}/nowhere"], "nowhere can't be read"),
        (["info", "{trace}", "--format", "csv"], "unknown format 'csv': choose one of azure-2023"),
        (["info", "{trace}", "--format", "mooncake"], "is not of format mooncake"),
        (["info", "{trace}", "--window", "2h..1h"], "--window '2h..1h' ends before it begins"),
        (["info", "{trace}", "--window", "1h.."], "no request of the trace is left"),
        (["info", "{trace}", "--speed", "0"], "--speed 0.0 is no factor above 0"),
        (["info", "{trace}", "--plot", "{folder}/no/plot.png"], "no/plot.png can't be written"),
        (["convert", "{trace}", "{folder}"], "can't be written"),
        (["make", "{folder}/x", "--shape", "wild"], "unknown --shape 'wild'"),
        (["make", "{folder}/x", "--rate", "0"], "requests_per_s is to be above 0"),
    ],
)
def test_what_is_wrong_is_one_line(run, trace: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:  # type: ignore[no-untyped-def]
    code, _, told = run("trace", *[argument.format(folder=tmp_path, trace=trace) for argument in arguments])
    assert code == 2
    assert told.startswith("error: ")
    assert sentence in told
