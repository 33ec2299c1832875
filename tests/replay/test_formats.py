"""Every format, read to the last digit; what is wrong with a row is counted and named, or refused."""

from __future__ import annotations

import gzip
import io
from dataclasses import replace

import numpy as np
import pytest

from replay.formats import jsonl
from replay.reading import Trace
from replay.trace import Chunk, TraceError, TraceRequest, requests
from replay.transforms import in_order
from tests.replay.conftest import AZURE_2023, AZURE_2024, BURSTGPT, BURSTGPT_NEWER, EVERMOE, MOONCAKE, TEXTS, WriteTrace


def read(trace: Trace) -> list[TraceRequest]:
    return list(requests(trace))


def rows(trace: Trace) -> list[tuple[float, int, int]]:
    return [(r.time_s, r.prompt_tokens, r.answer_tokens) for r in read(trace)]


def test_azure_2023(write: WriteTrace) -> None:
    trace = Trace(write(AZURE_2023))
    assert trace.format.name == "azure-2023"
    assert rows(trace) == [(0.0, 374, 44), (4.314579, 396, 109), (4.5419778, 879, 55), (60.0, 91, 16)]


def test_azure_2024(write: WriteTrace) -> None:
    """Offsets count: the last row is written in another time zone."""
    trace = Trace(write(AZURE_2024))
    assert trace.format.name == "azure-2024"
    assert rows(trace) == [(0.0, 2162, 5), (0.007405, 2399, 6), (0.99007, 76, 15), (86400.0, 3, 1)]


def test_burstgpt_keeps_failures_as_answers_of_no_tokens(write: WriteTrace) -> None:
    trace = Trace(write(BURSTGPT))
    assert trace.format.name == "burstgpt"
    assert rows(trace) == [(0.0, 472, 18), (40.0, 1087, 230), (113.0, 417, 0), (113.5, 1360, 203)]


def test_burstgpt_of_newer_files(write: WriteTrace) -> None:
    trace = Trace(write(BURSTGPT_NEWER))
    assert trace.format.name == "burstgpt"
    assert rows(trace) == [(0.0, 906, 446), (51.0, 36, 29), (51.5, 36, 0)]


def test_mooncake_tells_shared_prefixes(write: WriteTrace) -> None:
    trace = Trace(write(MOONCAKE))
    assert trace.format.name == "mooncake"
    assert rows(trace) == [(0.0, 1100, 6), (0.04, 600, 4), (0.04, 28, 445), (12.277, 1030, 3)]
    assert [r.hash_ids for r in read(trace)] == [(0, 1, 2), (0, 7), (8,), (0, 1, 9)]


def test_our_own(write: WriteTrace) -> None:
    trace = Trace(write(EVERMOE))
    assert trace.format.name == "evermoe"
    assert read(trace) == [
        TraceRequest(0, 0.0, 374, 44), TraceRequest(1, 0.25, 30, 4, (7,), "code"), TraceRequest(2, 1.0000001, 3, 0),
    ]  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_converted_reads_the_same(write: WriteTrace, name: str) -> None:
    first = read(Trace(write(TEXTS[name])))
    file = io.BytesIO()
    assert jsonl.write(Trace(write(TEXTS[name])), file) == len(first)
    assert read(Trace(write(file.getvalue(), "own.jsonl"))) == first


@pytest.mark.parametrize("name", TEXTS)
def test_no_format_takes_another_for_itself(write: WriteTrace, name: str) -> None:
    path = write(TEXTS[name])
    assert Trace(path, name=name).format.name == name
    for other in set(TEXTS) - {name}:
        with pytest.raises(TraceError, match=f"not of format {other}"):
            Trace(path, name=other)


@pytest.mark.parametrize("name", TEXTS)
def test_zipped_files_of_windows_and_small_blocks_are_all_the_same(write: WriteTrace, name: str) -> None:
    plain = read(Trace(write(TEXTS[name])))
    assert read(Trace(write(TEXTS[name], "trace.csv.gz"))) == plain
    assert read(Trace(write(TEXTS[name].replace("\n", "\r\n")))) == plain
    assert read(Trace(write("\ufeff" + TEXTS[name]))) == plain
    for block_bytes in (1, 7, 60, 100):
        assert read(Trace(write(TEXTS[name]), block_bytes=block_bytes)) == plain


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("block_bytes", [40, 1 << 20])
def test_rows_that_are_none_are_counted_and_named(write: WriteTrace, name: str, block_bytes: int) -> None:
    lines = TEXTS[name].splitlines()
    lines[2:2] = ["", "rubbish"]
    path = write("\n".join(lines) + "\n")
    trace = Trace(path, block_bytes=block_bytes)
    assert len(read(trace)) == len(read(Trace(write(TEXTS[name], "good.csv"))))
    assert trace.problems.count == 1
    assert trace.problems.named[0].startswith(f"{path}:4: ")
    with pytest.raises(TraceError, match=r"trace\.csv:4: .*without --strict"):
        read(Trace(path, strict=True, block_bytes=block_bytes))


WRONG = {
    "2023-11-16 18:15:50.9951690,-1,109": "ContextTokens is negative: -1",
    "2023-11-16 18:15:50.9951690,1,-109": "GeneratedTokens is negative: -109",
    "2023-11-16 18:15:50.9951690,1,": "GeneratedTokens is missing",
    "2023-11-16 18:15:50.9951690,1.5,1": "ContextTokens is no whole number: '1.5'",
    "2023-11-16 18:15:50.9951690,1,1,1": "4 columns instead of 3",
    "2023-11-16 18:15:50.9951690,99999999999,1": "ContextTokens is no length: 99999999999",
    "2023-11-16 18:15:50+00:00,1,1": "TIMESTAMP is not YYYY-MM-DD HH:MM:SS.fffffff: '2023-11-16 18:15:50+00:00'",
    "2023-13-16 18:15:50,1,1": "TIMESTAMP is not",
    "9023-11-16 18:15:50,1,1": "TIMESTAMP is not",
    "yesterday,1,1": "TIMESTAMP is not",
    "2023-11-16 18:15:46.6805800,1,1": "goes 1e-05 s back in time; `evermoe trace convert --sort` puts rows in order",
}


@pytest.mark.parametrize("line", WRONG)
def test_the_reason_is_told(write: WriteTrace, line: str) -> None:
    lines = AZURE_2023.splitlines()
    trace = Trace(write("\n".join([*lines[:2], line, *lines[2:]]) + "\n"))
    assert len(read(trace)) == 4
    [problem] = trace.problems.named
    assert WRONG[line] in problem
    assert ":3: " in problem


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"timestamp": 50, "input_length": -5, "output_length": 1}', "input_length is negative: -5"),
        ('{"timestamp": 50, "input_length": 5, "output_length": "x"}', "`$.output_length`"),
        ('{"timestamp": 50, "input_length": 5}', "missing required field `output_length`"),
        ('{"timestamp": 50, "input_length": 1' + "0" * 30 + ', "output_length": 1}', "input_length"),
        ('{"timestamp": 1e300, "input_length": 5, "output_length": 1}', "timestamp is no time"),
        ('{"timestamp": 50, "input_len', "truncated"),
    ],
)
def test_the_reason_is_told_of_json_too(write: WriteTrace, line: str, reason: str) -> None:
    lines = MOONCAKE.splitlines()
    trace = Trace(write("\n".join([*lines[:3], line, *lines[3:]]) + "\n"))
    assert len(read(trace)) == 4
    [problem] = trace.problems.named
    assert reason in problem
    assert ":4: " in problem


@pytest.mark.parametrize("text", ["Timestamp,Request tokens,Response tokens\n1,2,3\nnan,2,3\ninf,2,3\n2,2,3\n"])
def test_times_that_are_none(write: WriteTrace, text: str) -> None:
    trace = Trace(write(text))
    assert rows(trace) == [(0.0, 2, 3), (1.0, 2, 3)]
    assert [problem.rpartition(": ")[2] for problem in trace.problems.named] == ["nan", "inf"]


def test_a_trace_cut_in_the_middle_of_a_row(write: WriteTrace) -> None:
    trace = Trace(write(AZURE_2023[:-12]))
    assert len(read(trace)) == 3
    assert "ends in the middle of this line" in trace.problems.named[0]


def test_a_trace_cut_in_the_middle_of_a_number_can_only_be_suspected(write: WriteTrace) -> None:
    trace = Trace(write(AZURE_2023[:-2]))
    assert rows(trace)[-1] == (60.0, 91, 1)
    assert trace.problems.count == 0
    assert ":5: the last line has no end" in trace.problems.notes[0]


def test_a_zipped_trace_cut_in_the_middle(write: WriteTrace) -> None:
    zipped = gzip.compress((AZURE_2023 * 100).encode())
    path = write(b"")
    path.write_bytes(zipped[:-30])
    with pytest.raises(TraceError, match="damaged or cut off behind line"):
        read(Trace(path))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "a header and no rows"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,x,1\n", "none of its 1 rows can be used"),
        ("a,b\n1,2\n", "no trace in a known format: it begins with 'a,b'"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4b\n", "git lfs pull"),
    ],
)
def test_files_that_are_no_traces(write: WriteTrace, text: str, sentence: str) -> None:
    path = write(text)
    with pytest.raises(TraceError, match=sentence):
        read(Trace(path))


def test_a_file_that_is_not_there(write: WriteTrace) -> None:
    with pytest.raises(TraceError, match="nowhere can't be read"):
        Trace(write("").parent / "nowhere")
    with pytest.raises(TraceError, match="can't be read"):
        Trace(write("").parent)


def test_an_unsorted_trace_can_be_sorted(write: WriteTrace) -> None:
    lines = AZURE_2023.splitlines()
    path = write("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    unsorted = Trace(path)
    assert len(read(unsorted)) == 1
    assert unsorted.problems.count == 3
    ordered = list(requests(in_order(Trace(path, in_order=False))))
    for row, expected in zip(ordered, read(Trace(write(AZURE_2023, "sorted.csv"))), strict=True):
        assert row == replace(expected, time_s=row.time_s)
        assert row.time_s == pytest.approx(expected.time_s, abs=1e-9)


def test_order_is_kept_across_blocks(write: WriteTrace) -> None:
    times = [1, 2, 5, 3, 4, 5, 6]
    text = "Timestamp,Request tokens,Response tokens\n" + "".join(f"{time},{time},1\n" for time in times)
    for block_bytes in (6, 1 << 20):
        trace = Trace(write(text), block_bytes=block_bytes)
        assert [r.prompt_tokens for r in read(trace)] == [1, 2, 5, 5, 6]
        assert trace.problems.count == 2


def test_a_chunk_gives_rows_by_number() -> None:
    chunk = Chunk(np.array([0.0, 1.0]), np.array([5, 6]), np.array([7, 8]), ((1,), (2,)), ("a", "b"))
    assert list(requests([chunk.take(np.array([1, 1]))])) == [
        TraceRequest(0, 1.0, 6, 8, (2,), "b"), TraceRequest(1, 1.0, 6, 8, (2,), "b"),
    ]  # fmt: skip
