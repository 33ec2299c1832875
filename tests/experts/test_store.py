"""A store holds exactly what transformers would load, and says so; a damaged one is refused by name."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from experts.conversion import ExpertGroup, Grain
from experts.store import ExpertStore, StoreError, prepare
from tests.checkpoints import FAMILIES, tiny_model, write_checkpoint

LAYOUTS = {
    "single": (torch.float32, 1),
    "sharded": (torch.float32, 3),
    "bf16": (torch.bfloat16, 2),
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    folder = tmp_path_factory.mktemp("mixtral")
    return prepare(write_checkpoint("mixtral", folder / "checkpoint"), folder / "store")


@pytest.fixture
def copy(mixtral: ExpertStore, tmp_path: Path) -> Path:
    """A store of its own for a test that breaks it."""
    return Path(shutil.copytree(mixtral.path, tmp_path / "store"))


def loaded_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the model as transformers loads it, those of tied weights under both names."""
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").state_dict()
    return state


def assert_same_tensors(store: ExpertStore, expected: dict[str, torch.Tensor]) -> None:
    gateway = store.gateway_weights()
    tied = {"lm_head.weight"} if store.manifest.tied else set()
    inside = {name for name in expected if ".experts." in name}
    assert gateway.keys() == expected.keys() - inside - tied
    for name, tensor in gateway.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    seen = set()
    for expert in range(store.manifest.num_experts):
        for layer in store.manifest.moe_layers:
            for param, tensor in store.slice(layer, expert).items():
                name = next(n for n in inside if f".{layer}." in n and n.endswith(f".experts.{param}"))
                assert torch.equal(tensor, expected[name][expert]), (name, expert)
                assert tuple(tensor.shape) == store.manifest.expert_params[param]
                seen.add(name)
    assert seen == inside


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family: str, layout: str, tmp_path: Path) -> None:
    dtype, shards = LAYOUTS[layout]
    checkpoint = write_checkpoint(family, tmp_path / "checkpoint", dtype=dtype, shards=shards)
    store = prepare(checkpoint, tmp_path / "store")
    assert store.manifest.family == family
    assert store.manifest.dtype == str(dtype).removeprefix("torch.")
    assert_same_tensors(ExpertStore.open(store.path, verify=True), loaded_tensors(checkpoint))
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_conversions_that_need_a_whole_layer_give_the_same(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_checkpoint(family, tmp_path / "checkpoint")
    expected = prepare(checkpoint, tmp_path / "store").manifest
    whole = ExpertGroup.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        ExpertGroup, "of", classmethod(lambda *args: dataclasses.replace(whole(*args), grain=Grain.WHOLE))
    )
    assert prepare(checkpoint, tmp_path / "whole").manifest == expected


def test_the_manifest_describes_the_model(tmp_path: Path) -> None:
    manifest = prepare(write_checkpoint("deepseek_v3", tmp_path / "c"), tmp_path / "s").manifest
    assert manifest.architecture == "DeepseekV3ForCausalLM"
    assert (manifest.num_experts, manifest.top_k, manifest.hidden_size) == (8, 2, 32)
    assert manifest.moe_layers == (2, 3)
    assert manifest.expert_params == {"gate_up_proj": (48, 32), "down_proj": (32, 24)}


def test_a_family_keeps_the_tensors_in_fp32_that_transformers_keeps(tmp_path: Path) -> None:
    checkpoint = write_checkpoint("deepseek_v3", tmp_path / "c", dtype=torch.bfloat16)
    weights = prepare(checkpoint, tmp_path / "s").gateway_weights()
    assert weights["model.layers.2.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert weights["model.layers.2.mlp.gate.weight"].dtype == torch.bfloat16


def test_casting_gives_what_transformers_gives(tmp_path: Path) -> None:
    checkpoint = write_checkpoint("gpt_oss", tmp_path / "c")
    store = prepare(checkpoint, tmp_path / "s", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert_same_tensors(store, model.state_dict())
    assert store.config().dtype == torch.bfloat16


def test_equal_content_has_an_equal_fingerprint(tmp_path: Path) -> None:
    one, same = (
        prepare(write_checkpoint("olmoe", tmp_path / f"c{shards}", shards=shards), tmp_path / f"s{shards}").manifest
        for shards in (1, 3)
    )
    other = prepare(write_checkpoint("olmoe", tmp_path / "c", seed=1), tmp_path / "s").manifest
    config = tmp_path / "c3" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.1}))
    changed = prepare(tmp_path / "c3", tmp_path / "changed").manifest
    assert one.fingerprint == same.fingerprint
    assert len({one.fingerprint, other.fingerprint, changed.fingerprint}) == 3


def test_tied_weights_that_differ_are_both_kept(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.all_tied_weights_keys = {}
    model.save_pretrained(tmp_path / "c")
    config = tmp_path / "c" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}))
    store = prepare(tmp_path / "c", tmp_path / "s")
    assert torch.equal(store.gateway_weights()["lm_head.weight"], model.lm_head.weight)
    assert not store.config().tie_word_embeddings


def test_tensors_are_views_of_the_map_and_go_with_it(mixtral: ExpertStore) -> None:
    def mapped() -> bool:
        return str(mixtral.path / "experts" / "1.safetensors") in Path("/proc/self/maps").read_text()

    first, second = mixtral.slice(0, 1), mixtral.slice(1, 1)
    del first
    assert mapped()
    del second
    assert not mapped()


def test_tokenizer_and_configuration_come_along(tmp_path: Path) -> None:
    checkpoint = write_checkpoint("mixtral", tmp_path / "c")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (checkpoint / name).write_text(f'{{"from": "{name}"}}')
    (checkpoint / "modeling_custom.py").write_text("raise SystemExit")
    store = prepare(checkpoint, tmp_path / "s")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "config.json",
    ):
        assert (store.path / name).read_bytes() == (checkpoint / name).read_bytes()
        assert name in store.manifest.files
    assert not (store.path / "modeling_custom.py").exists()


def every_file(store: Path) -> list[Path]:
    return sorted(path for path in store.rglob("*") if path.is_file())


def test_a_flipped_byte_in_any_file_is_found(copy: Path) -> None:
    for file in every_file(copy):
        content = file.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
            with pytest.raises(StoreError, match=file.name) as refusal:
                ExpertStore.open(copy, verify=True)
            assert "evermoe prepare" in str(refusal.value)
            assert "\n" not in str(refusal.value)
        file.write_bytes(content)
    ExpertStore.open(copy, verify=True)


def test_a_missing_or_shorter_file_is_found_without_reading_it(copy: Path) -> None:
    for file in every_file(copy):
        if file.name == "manifest.json":
            continue
        content = file.read_bytes()
        file.write_bytes(content[:-1])
        with pytest.raises(StoreError, match=file.name):
            ExpertStore.open(copy)
        file.unlink()
        with pytest.raises(StoreError, match=file.name):
            ExpertStore.open(copy)
        file.write_bytes(content)


def test_a_manifest_of_another_version_is_refused(copy: Path) -> None:
    file = copy / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 99}))
    with pytest.raises(StoreError, match=r"version 99, this evermoe reads version 1; prepare the store again"):
        ExpertStore.open(copy)


def test_what_is_not_a_store_is_refused_with_the_remedy(tmp_path: Path, mixtral: ExpertStore) -> None:
    checkpoint = write_checkpoint("mixtral", tmp_path / "c")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.partial").mkdir()
    refusals = {
        tmp_path / "nowhere": r"does not exist; make it with `evermoe prepare",
        checkpoint: r"is a checkpoint, not an expert store; convert it with `evermoe prepare",
        tmp_path / "empty": r"not an expert store: it has no manifest.json",
        tmp_path / "cut": r"not complete, its preparation was cut off; run `evermoe prepare` again",
    }
    for path, message in refusals.items():
        with pytest.raises(StoreError, match=message):
            ExpertStore.open(path)
    with pytest.raises(StoreError, match="is an expert store already"):
        prepare(mixtral.path, tmp_path / "again")
    with pytest.raises(StoreError, match="experts 0 to 3, not 4"):
        mixtral.slice(0, 4)


def test_preparing_again_gives_the_store_that_is_there(tmp_path: Path) -> None:
    write = functools.partial(write_checkpoint, "mixtral", tmp_path / "c")
    first = prepare(write(), tmp_path / "s")
    before = (tmp_path / "s" / "manifest.json").stat().st_ino
    assert prepare(tmp_path / "c", tmp_path / "s") == first
    assert (tmp_path / "s" / "manifest.json").stat().st_ino == before
    with pytest.raises(StoreError, match="another dtype; delete it or choose another folder"):
        prepare(tmp_path / "c", tmp_path / "s", dtype="float16")
    write(seed=1)
    with pytest.raises(StoreError, match="was prepared from another checkpoint"):
        prepare(tmp_path / "c", tmp_path / "s")


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"not an expert store"):
        prepare(write_checkpoint("mixtral", tmp_path / "c"), tmp_path / "s")
    assert (tmp_path / "s" / "notes.txt").read_text() == "mine"
