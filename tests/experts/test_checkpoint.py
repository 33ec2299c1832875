"""A checkpoint that cannot be converted is refused in one line that names the file and the remedy."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.checkpoint import INDEX, SINGLE, Checkpoint
from experts.store import StoreError, prepare
from tests.checkpoints import write_checkpoint

Breakage = Callable[[Path], object]


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(checkpoint: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(checkpoint / SINGLE)
    edit(tensors)
    save_file(tensors, checkpoint / SINGLE)


def shorten(file: Path, size: int) -> None:
    with file.open("rb+") as stream:
        stream.truncate(size)


def rename_in_index(checkpoint: Path, old: str, new: str) -> None:
    places = json.loads((checkpoint / INDEX).read_text())["weight_map"]
    edit_json(checkpoint / INDEX, weight_map={name.replace(old, new): shard for name, shard in places.items()})


def swap_for_pickle(checkpoint: Path) -> None:
    (checkpoint / SINGLE).rename(checkpoint / "pytorch_model.bin")


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
SHARD = "model-00002-of-00004.safetensors"

SINGLE_FILE: dict[str, tuple[Breakage, str]] = {
    "no configuration": (lambda c: (c / "config.json").unlink(), r"config.json does not exist; give a Hugging Face"),
    "broken configuration": (lambda c: shorten(c / "config.json", 40), r"config.json is not valid JSON"),
    "a list for a configuration": (lambda c: (c / "config.json").write_text("[]"), r"config.json does not hold"),
    "no model type": (lambda c: (c / "config.json").write_text("{}"), r"config.json names no model_type"),
    "a bad value": (
        lambda c: edit_json(c / "config.json", hidden_size="wide"),
        r"not a valid .olmoe. configuration: .*hidden_size",
    ),
    "no weights": (lambda c: (c / SINGLE).unlink(), rf"has neither {SINGLE} nor {INDEX}; download"),
    "pickled weights": (swap_for_pickle, r"only pickled weights, which are never loaded .*save_pretrained"),
    "a cut file": (
        lambda c: shorten(c / SINGLE, 90_000),
        r"model.safetensors is truncated .*has 90000 bytes and should",
    ),
    "a cut header": (lambda c: shorten(c / SINGLE, 100), r"model.safetensors is truncated or damaged"),
    "an empty file": (lambda c: shorten(c / SINGLE, 0), r"model.safetensors is truncated or damaged"),
    "a pointer": (
        lambda c: (c / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        r"is a git-lfs pointer, not the weights; run `git lfs pull`",
    ),
    "no router": (
        lambda c: edit_tensors(c, lambda t: t.pop("model.layers.2.mlp.gate.weight")),
        r"there is no tensor for model.layers.2.mlp.gate.weight; the checkpoint is incomplete",
    ),
    "an expert missing": (
        lambda c: edit_tensors(c, lambda t: t.pop(EXPERT)),
        r"the tensors for model.layers.1.mlp.experts.gate_up_proj do not fit together|has shape .* incomplete",
    ),
    "a layer's experts missing": (
        lambda c: edit_tensors(c, lambda t: [t.pop(name) for name in list(t) if "layers.1.mlp.experts" in name]),
        r"there is no tensor for model.layers.1.mlp.experts.gate_up_proj",
    ),
    "an expert of another width": (
        lambda c: edit_tensors(c, lambda t: t.update({EXPERT: torch.zeros(40, 32)})),
        r"do not fit together|has shape",
    ),
    "another configuration": (
        lambda c: edit_json(c / "config.json", intermediate_size=64),
        r"has shape .* in the weights but .* in config.json; they belong to different models",
    ),
    "more layers than there are": (
        lambda c: edit_json(c / "config.json", num_hidden_layers=4),
        r"there is no tensor for model.layers.3",
    ),
    "a quantised dtype": (
        lambda c: edit_tensors(c, lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)})),
        r"dtype F8_E4M3, so the checkpoint is quantised; save a dequantised copy",
    ),
    "double precision": (
        lambda c: edit_json(c / "config.json", dtype="float64"),
        r"dtype float64, which is not served",
    ),
}

SHARDED: dict[str, tuple[Breakage, str]] = {
    "a missing shard": (lambda c: (c / SHARD).unlink(), rf"{SHARD} is missing, {INDEX} names it"),
    "a cut shard": (lambda c: shorten(c / SHARD, 20_000), rf"{SHARD} is truncated or damaged"),
    "a broken index": (lambda c: shorten(c / INDEX, 40), rf"{INDEX} is not valid JSON"),
    "an empty index": (lambda c: (c / INDEX).write_text("{}"), rf"{INDEX} has no weight_map"),
    "a wrong index": (lambda c: rename_in_index(c, "layers.2", "layers.7"), r"which has no such tensor; download"),
    "a shard outside": (lambda c: edit_json(c / INDEX, weight_map={"x": "../x.safetensors"}), r"not a file of this"),
}


def assert_refused(checkpoint: Path, message: str, dtype: str = "auto") -> None:
    store = checkpoint.with_name("store")
    with pytest.raises(StoreError, match=message) as refusal:
        prepare(checkpoint, store, dtype=dtype)
    assert "\n" not in str(refusal.value)
    assert not store.exists()
    assert not store.with_name("store.partial").exists()
    with pytest.raises(StoreError, match=message):
        prepare(checkpoint, store, dtype=dtype)


@pytest.mark.parametrize("what", SINGLE_FILE)
def test_a_broken_checkpoint_is_refused(what: str, tmp_path: Path) -> None:
    breakage, message = SINGLE_FILE[what]
    checkpoint = write_checkpoint("olmoe", tmp_path / "checkpoint")
    breakage(checkpoint)
    assert_refused(checkpoint, message)


@pytest.mark.parametrize("what", SHARDED)
def test_a_broken_sharded_checkpoint_is_refused(what: str, tmp_path: Path) -> None:
    breakage, message = SHARDED[what]
    checkpoint = write_checkpoint("olmoe", tmp_path / "checkpoint", shards=3)
    assert (checkpoint / SHARD).exists()
    breakage(checkpoint)
    assert_refused(checkpoint, message)


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(tmp_path / "nowhere", "does not exist; download the model first")
    assert_refused(tmp_path / "file", "is a file; give the checkpoint's folder")


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    checkpoint = write_checkpoint("olmoe", tmp_path / "checkpoint")
    assert_refused(checkpoint, "dtype 'fp8' is not supported; choose auto, float32", dtype="fp8")


def test_tensors_that_the_model_has_no_place_for_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = write_checkpoint("olmoe", tmp_path / "checkpoint")
    edit_tensors(checkpoint, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(3)}))
    assert "model.extra.weight" not in prepare(checkpoint, tmp_path / "store").gateway_weights()
    assert "1 tensors have no place in the model, left out: model.extra.weight" in caplog.text


def test_the_digest_changes_with_every_file(tmp_path: Path) -> None:
    checkpoint = write_checkpoint("olmoe", tmp_path / "checkpoint", shards=2)
    digests = {Checkpoint.open(checkpoint).digest}
    edit_json(checkpoint / "config.json", rms_norm_eps=0.5)
    digests.add(Checkpoint.open(checkpoint).digest)
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes())
    digests.add(Checkpoint.open(checkpoint).digest)
    assert len(digests) == 3
    assert Checkpoint.open(checkpoint).digest in digests
