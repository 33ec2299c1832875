"""Makes the 1.3 GB checkpoint of the memory benchmark, in a process of its own: python -m bench.checkpoint OUT."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from deploy.models import DEFAULT_MODEL


def main(out: Path) -> None:
    """Write random weights: 8 layers x 16 experts top-2, hidden 1024, expert width 768, fp32, four shards."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=1024,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1024,
        moe_intermediate_size=768,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=0,
        bos_token_id=0,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(out, max_shard_size="400MB")
    for file in DEFAULT_MODEL.glob("*token*"):
        shutil.copy(file, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
