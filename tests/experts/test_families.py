"""What can be served is found out from the model itself; what cannot is refused with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from experts import families
from experts.store import StoreError, prepare
from tests.checkpoints import FAMILIES, tiny_config, tiny_model, write_checkpoint

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}

# Families beyond those of tests.checkpoints: nothing is written for them, they are proof that nothing needs to be.
MORE_FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_experts": 4, "num_dense_layers": 1, "num_shared_experts": 1},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},  # transposed weights
    "cohere2_moe": {"num_experts": 4},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    "flex_olmo": {"num_experts": 4, "pad_token_id": 0},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 24},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "hy_v3": {"num_experts": 4, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "mimo_v2_flash": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "minimax_m2": {"num_local_experts": 4},
    "solar_open": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1},
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, r"'llama' is not a Mixture-of-Experts model .*serve it with a dense engine"),
    "dbrx": ({}, r"does not run their experts through its pluggable experts interface"),
    "jetmoe": ({}, r"does not run their experts through its pluggable experts interface"),
    "longcat_flash": ({}, r"does not run their experts through its pluggable experts interface"),
    "llama4_text": ({}, r"does not run their experts through its pluggable experts interface"),
    "llama4": ({}, r"multi-modal"),
    "qwen3_vl_moe": ({}, r"multi-modal"),
    "qwen3_next": ({}, r"keep a state instead of a KV cache are not supported \(linear_attention\)"),
    "jamba": ({}, r"keep a state instead of a KV cache"),
    "nemotron_h": ({}, r"keep a state instead of a KV cache"),
    "granitemoehybrid": ({}, r"keep a state instead of a KV cache"),
    "minimax": ({}, r"keep a state instead of a KV cache"),
    "deepseek_v32": ({}, r"sparse attention with an indexer is not supported"),
    "glm_moe_dsa": ({}, r"sparse attention with an indexer is not supported"),
    "t5": ({}, r"encoder-decoder"),
    "mixtral": ({"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\); save a dequantised copy"),
}


def small_config(family: str, extra: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(family, **{**SMALL, **extra})


def refuse(config: PretrainedConfig) -> None:
    families.refuse_unsupported(config)
    families.moe_modules(families.meta_model(config, torch.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_of_the_suite_are_served(family: str) -> None:
    refuse(tiny_config(family))


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_further_families_convert_without_any_code_for_them(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(small_config(family, MORE_FAMILIES[family])).save_pretrained(tmp_path / "c")
    store = prepare(tmp_path / "c", tmp_path / "s")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c")
    state = model.state_dict()
    for name, tensor in store.gateway_weights().items():
        assert torch.equal(tensor, state[name]), name
    for expert in range(store.manifest.num_experts):
        for layer, module in families.moe_modules(model).items():
            for param, tensor in store.slice(layer, expert).items():
                assert torch.equal(tensor, module.get_parameter(param)[expert]), (layer, expert, param)


@pytest.mark.parametrize("family", REFUSED)
def test_others_are_refused_with_the_reason(family: str) -> None:
    options, reason = REFUSED[family]
    with pytest.raises(StoreError, match=reason):
        refuse(AutoConfig.for_model(family, **options))


def test_experts_are_found_with_their_absolute_layer() -> None:
    modules = families.moe_modules(tiny_model("deepseek_v3"))
    assert list(modules) == [2, 3]
    assert {type(module).__name__ for module in modules.values()} == {"DeepseekV3Experts"}
    assert families.expert_shapes(modules[2]) == {"gate_up_proj": (48, 32), "down_proj": (32, 24)}


def test_a_model_on_the_meta_device_takes_no_memory_however_large() -> None:
    model = families.meta_model(AutoConfig.for_model("deepseek_v3"), torch.bfloat16)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) > 1e12
    assert families.count_experts(families.moe_modules(model)[3]) == 256


@pytest.mark.parametrize(
    ("name", "layer"),
    [("model.layers.12.mlp.experts", 12), ("lm_head.weight", None), ("transformer.h.0.attn", 0), ("model.norm2", None)],
)
def test_layer_numbers_in_names(name: str, layer: int | None) -> None:
    assert families.layer_of(name) == layer


def test_code_that_comes_with_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    checkpoint = write_checkpoint("mixtral", tmp_path / "c")
    (checkpoint / "modeling_evil.py").write_text("raise SystemExit('ran')")
    (checkpoint / "configuration_evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((checkpoint / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    (checkpoint / "config.json").write_text(json.dumps(config))
    prepare(checkpoint, tmp_path / "s")  # transformers knows Mixtral itself
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(
        StoreError, match=r"'evil' runs on Python code of its own \(auto_map in config.json\), which is"
    ):
        prepare(checkpoint, tmp_path / "s2")
    del config["auto_map"]
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(StoreError, match="'evil' is unknown to this transformers; upgrade"):
        prepare(checkpoint, tmp_path / "s2")
