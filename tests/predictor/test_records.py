"""Routing records: what is written comes back, and what cannot be right is refused in one sentence."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from predictor.load_step import SIGNALS, LoadStep
from predictor.records import RecordError, RecordWriter, read_records, stack
from predictor.shape import ModelShape
from predictor.signals import LoadSignals
from tests.predictor.steps import SHAPE, routings


@pytest.fixture(scope="module")
def steps() -> list[LoadStep]:
    signals = LoadSignals(SHAPE)
    return [signals.observe(routing) for routing in routings(60)]


@pytest.fixture
def file(tmp_path: Path, steps: list[LoadStep]) -> Path:
    return written(tmp_path / "records.parquet", steps)


def written(path: Path, steps: list[LoadStep], shape: ModelShape = SHAPE) -> Path:
    with RecordWriter(path, shape) as writer:
        for step in steps:
            writer.append(step)
    return path


def test_what_is_written_comes_back(file: Path, steps: list[LoadStep]) -> None:
    read, had = read_records(file, SHAPE), stack(SHAPE, steps)
    assert len(read) == len(steps)
    for field in dataclasses.fields(read):
        if field.name == "signals":
            np.testing.assert_allclose(read.signals, had.signals, atol=1e-3)
        elif field.name != "shape":
            np.testing.assert_array_equal(getattr(read, field.name), getattr(had, field.name))
    assert (read.counts.sum(axis=2) == SHAPE.top_k * (read.prefill_rows + read.decode_rows)[:, None]).all()


def test_the_file_says_what_it_holds_and_has_no_tokens_in_it(file: Path) -> None:
    schema = pq.read_schema(file)
    assert ModelShape.from_json(schema.metadata[b"evermoe.shape"]) == SHAPE
    assert {f"share:{name}" for name in SIGNALS} < set(schema.names)
    assert not [name for name in schema.names if "token_ids" in name or "text" in name]


def test_the_file_is_bounded_and_what_did_not_fit_is_counted(tmp_path: Path, steps: list[LoadStep]) -> None:
    with RecordWriter(tmp_path / "small", SHAPE, max_bytes=30_000) as writer:
        for step in steps:
            writer.append(step)
    assert writer.full
    assert writer.path.stat().st_size <= 30_000
    assert 0 < writer.written < len(steps) == writer.written + writer.dropped
    assert len(read_records(tmp_path / "small")) == writer.written


def test_nothing_that_looks_complete_is_there_before_the_end(tmp_path: Path, steps: list[LoadStep]) -> None:
    writer = RecordWriter(tmp_path / "records", SHAPE)
    writer.append(steps[0])
    assert not (tmp_path / "records").exists()
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["records"]


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_file_cut_short_is_refused(file: Path, keep: float) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    with pytest.raises(RecordError, match=re.escape(f"{file} is damaged or no Parquet file")):
        read_records(file)


def test_bytes_that_changed_are_refused(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 8 : len(damaged) // 8 + 400] = bytes(400)
    file.write_bytes(damaged)
    with pytest.raises(RecordError, match="is damaged"):
        read_records(file)


def test_records_of_another_model_are_refused(file: Path) -> None:
    other = dataclasses.replace(SHAPE, fingerprint="0" * 64)
    with pytest.raises(RecordError, match="was recorded from another model: 3 layers x 6 experts"):
        read_records(file, other)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="is no file"):
        read_records(tmp_path / "nothing")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign")
    with pytest.raises(RecordError, match="holds no routing records"):
        read_records(tmp_path / "foreign")


def test_another_version_is_refused(file: Path) -> None:
    table = pq.read_table(file)
    metadata = {**table.schema.metadata, b"evermoe.records": b"99"}
    pq.write_table(table.replace_schema_metadata(metadata), file)
    with pytest.raises(RecordError, match="another release"):
        read_records(file)


def test_counts_that_do_not_add_up_are_refused(tmp_path: Path, steps: list[LoadStep]) -> None:
    wrong = dataclasses.replace(steps[-1], prefill_rows=steps[-1].prefill_rows + 1)
    with pytest.raises(RecordError, match="does not add up"):
        read_records(written(tmp_path / "wrong", [*steps[:-1], wrong]))


def test_times_that_run_backwards_are_refused(tmp_path: Path, steps: list[LoadStep]) -> None:
    with pytest.raises(RecordError, match="run backwards"):
        read_records(written(tmp_path / "wrong", steps[::-1]))
