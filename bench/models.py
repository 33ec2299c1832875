"""Checkpoints with random weights for measurements, made where they are needed: no model is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from deploy.models import cache_dir

_MID = {
    "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
    "intermediate_size": 1024, "moe_intermediate_size": 768, "num_experts": 16, "num_experts_per_tok": 2,
    "norm_topk_prob": True, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    "eos_token_id": 0, "bos_token_id": 0,
}  # fmt: skip
_VOCABULARY = 4096


def mid() -> Path:
    """A Qwen3-MoE of 327 M parameters in bf16 with a BPE tokenizer of 4096 tokens, kept in the cache."""
    folder = cache_dir() / "bench" / "mid"
    if not (folder / "config.json").exists():
        aside = folder.with_name(f"mid.{os.getpid()}")
        _write(aside)
        aside.rename(folder)
    return folder


def _write(folder: Path) -> None:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    _tokenizer().save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=_VOCABULARY, **_MID)).to(torch.bfloat16)
    model.save_pretrained(folder)


def _tokenizer() -> Any:
    """Byte-level BPE over Python's own library."""
    import sysconfig

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    files = sorted(map(str, Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=[end], show_progress=False, initial_alphabet=alphabet
    )
    bpe.train(files, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end, pad_token=end)
