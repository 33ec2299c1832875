"""`evermoe record`: the real engine on a virtual clock; the same seed gives the same record, wrong input one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from deploy import recording
from deploy.recording import Recording, RecordingError, parse_mix, record_traffic
from deploy.texts import TextError, token_streams
from deploy.virtual_engine import ANSWER_ROW_S, PROMPT_ROW_S, STEP_S
from experts.store import ExpertStore, prepare
from predictor.records import Records, read_records
from tests.checkpoints import VOCABULARY, write_checkpoint

TEXTS = {kind: np.random.default_rng(n).integers(2, VOCABULARY, 5000).astype(np.int32) for n, kind in enumerate("ab")}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    folder = tmp_path_factory.mktemp("recorded")
    return prepare(write_checkpoint("qwen3_moe", folder / "checkpoint"), folder / "store")


@pytest.fixture(autouse=True)
def _own_texts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EVERMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("deploy.texts.token_streams", lambda model, vocabulary: TEXTS)
    monkeypatch.setattr(recording, "_LONGEST", 120)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "record.parquet"
    assert not (tmp_path / "record.parquet.partial").exists()


def made(store: ExpertStore, out: Path, **options: object) -> Records:
    asked = Recording(**{"mix": {"a": 1.0, "b": 2.0}, "profile": "decode-heavy", **options})  # type: ignore[arg-type]
    record_traffic(store.path, out, asked, Console(quiet=True))
    return read_records(out)


def test_as_many_steps_as_asked_for(store: ExpertStore, out: Path) -> None:
    found = made(store, out, steps=40)
    assert len(found) == 40
    assert found.shape.fingerprint == store.manifest.fingerprint
    assert found.shape.layers == tuple(store.manifest.moe_layers)


def test_the_same_seed_gives_the_same_record(store: ExpertStore, out: Path) -> None:
    made(store, out, steps=60, seed=3)
    first = out.read_bytes()
    made(store, out, steps=60, seed=3)
    assert out.read_bytes() == first
    made(store, out, steps=60, seed=4)
    assert out.read_bytes() != first


def test_time_is_virtual(store: ExpertStore, out: Path) -> None:
    found = made(store, out, minutes=0.05)
    assert found.time_s[-1] == pytest.approx(3.0, abs=0.3)
    least = STEP_S + found.prefill_rows * PROMPT_ROW_S + found.decode_rows * ANSWER_ROW_S
    assert (np.diff(found.time_s) >= least[1:] - 1e-9).all()


def test_the_file_is_bounded(store: ExpertStore, out: Path) -> None:
    found = made(store, out, steps=2000, max_bytes=60_000)
    assert 0 < len(found) < 2000
    assert out.stat().st_size <= 70_000


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"profile": "busy"}, "unknown --profile 'busy': choose one of prefill-heavy, decode-heavy, mixed"),
        ({"mix": {"prose": 1.0}}, "no text of kind 'prose': the kinds are a, b"),
        ({"mix": {"a": 0.0}}, "not all 0"),
    ],
)
def test_what_can_not_be_recorded(store: ExpertStore, out: Path, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(RecordingError, match=sentence):
        made(store, out, steps=5, **options)


def test_a_folder_that_is_not_there(store: ExpertStore, tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="a folder that exists"):
        made(store, tmp_path / "nowhere" / "record", steps=5)


def test_mixes_are_read() -> None:
    assert parse_mix("code=3, chat=0.5") == {"code": 3.0, "chat": 0.5}
    with pytest.raises(RecordingError, match="code=3,chat=1"):
        parse_mix("code")


def test_a_model_without_a_tokenizer(store: ExpertStore) -> None:
    with pytest.raises(TextError, match=r"has no tokenizer\.json"):
        token_streams(store.path, VOCABULARY)
