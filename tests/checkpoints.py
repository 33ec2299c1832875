"""Tiny random checkpoints of every family the suite proves, laid out the way real ones are on a model hub.

The weights are seeded and wide enough that greedy decoding wanders over the vocabulary instead of repeating one token.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 128

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 4,
    "topk_group": 2,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "sliding_window": 6},
    "qwen2_moe": {
        "num_experts": 6,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "num_experts_per_tok": 3,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 4.0},
    "phimoe": {
        "num_local_experts": 4,
        "attention_bias": True,
        "lm_head_bias": True,
        "sliding_window": 6,
        "router_jitter_noise": 0.01,
    },
    "deepseek_v2": {**_MLA, "topk_method": "group_limited_greedy", "num_hidden_layers": 3},
    "deepseek_v3": {**_MLA, "norm_topk_prob": True, "first_k_dense_replace": 2, "num_hidden_layers": 4},
    "gpt_oss": {
        "num_local_experts": 4,
        "head_dim": 16,
        "sliding_window": 6,
        "swiglu_limit": 1.5,
        "num_hidden_layers": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "head_dim": 16,
        "use_qk_norm": True,
        "routed_scaling_factor": 1.5,
        "attention_bias": True,
    },
    "granitemoe": {
        "num_local_experts": 4,
        "embedding_multiplier": 1.5,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.8,
        "attention_multiplier": 0.5,
        "tie_word_embeddings": True,
    },
}


def tiny_config(family: str) -> PretrainedConfig:
    """The configuration `write_checkpoint` uses for `family` (one of `FAMILIES`)."""
    return AutoConfig.for_model(family, **{**_SHAPE, **FAMILIES[family]})


def tiny_model(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of `family` in evaluation mode, alike for alike arguments; the global seed is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(1000 + seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation="eager")
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        with torch.no_grad():
            for name, tensor in sorted(tensors.items()):
                _randomise(name, tensor)
    return model.to(dtype).eval()


def _randomise(name: str, tensor: torch.Tensor) -> None:
    """Wide weights, norms about one, and non-zero biases, sinks and correction biases."""
    if "inv_freq" in name or not tensor.is_floating_point():
        return
    if "norm" in name and tensor.ndim == 1 and name.endswith("weight"):
        tensor.uniform_(0.5, 1.5)
    elif tensor.ndim == 1 or name.endswith("_bias"):
        tensor.normal_(std=0.1 if name.endswith("bias") else 0.5)
    else:
        tensor.normal_(std=0.25)


def write_checkpoint(
    family: str, path: Path, *, dtype: torch.dtype = torch.float32, shards: int = 1, seed: int = 0
) -> Path:
    """Write a tiny checkpoint of `family` into the folder `path` (made if missing) and return `path`.

    The layout is the hub's (one tensor per expert where the family's hub checkpoints have that). `shards` is the least
    number of safetensors files; more than one come with an index, split by size so that layers straddle files.
    """
    model = tiny_model(family, dtype=dtype, seed=seed)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    model.save_pretrained(path, max_shard_size=size // shards if shards > 1 else "50GB")
    return path
