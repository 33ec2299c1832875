"""Which model families can be served, found out from the model itself instead of from a list of names.

A family qualifies when transformers runs its experts through the pluggable experts interface
(`transformers.integrations.moe.use_experts_implementation`) and every token mixer is attention over a KV cache.
"""

import copy
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.integrations import moe
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from experts.errors import StoreError

ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_INTERFACE = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")


def read_config(folder: Path, raw: dict[str, Any]) -> PretrainedConfig:
    """The configuration in `folder`, whose config.json holds `raw`; code that comes with a checkpoint is never run.

    Raises:
        StoreError: unknown model type, or values its family does not accept.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise StoreError(f"{folder}/config.json names no model_type; is this a Hugging Face transformers checkpoint?")
    if kind not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise StoreError(
                f"{folder}: model type '{kind}' runs on Python code of its own (auto_map in config.json), which is "
                "never executed; use a checkpoint whose family is part of transformers"
            )
        raise StoreError(f"{folder}: model type '{kind}' is unknown to this transformers; upgrade transformers")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise StoreError(f"{folder}/config.json is not a valid '{kind}' configuration: {_in_short(error)}") from error


def refuse_unsupported(config: PretrainedConfig) -> None:
    """Raise a StoreError that says why, if a configuration alone shows that its model cannot be served."""
    for applies, reason in _REFUSALS:
        if applies(config):
            raise StoreError(f"'{config.model_type}' models cannot be served: {reason(config)}")


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` on the meta device: names, shapes and dtypes of its tensors, and no memory.

    Raises:
        StoreError: the configuration is refused by its own modeling code.
    """
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"), init.no_init_weights(), init.no_tie_weights():
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        raise StoreError(f"transformers cannot build a '{config.model_type}' model: {_in_short(error)}") from error


def moe_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Every pluggable experts module of `model`, by absolute layer index, first layer first.

    Raises:
        StoreError: there is none, a layer has several, or the layers do not look alike.
    """
    found: dict[int, nn.Module] = {}
    for path, module in model.named_modules():
        if not all(hasattr(module, name) for name in _INTERFACE):
            continue
        number = layer_of(path)
        if number is None or number in found or any(True for _ in module.buffers()):
            raise StoreError(
                f"'{model.config.model_type}': the experts at {path} are not those of one layer, or keep buffers"
            )
        found[number] = module
    if not found:
        raise StoreError(_why_no_experts(model))
    shapes = {tuple(sorted(expert_shapes(module).items())) for module in found.values()}
    if len(shapes) > 1 or len({count_experts(module) for module in found.values()}) > 1:
        raise StoreError(f"'{model.config.model_type}': its layers hold experts of different number or shape")
    return dict(sorted(found.items()))


def layer_of(name: str) -> int | None:
    """The layer number in a module or tensor name (`model.layers.3.mlp` is 3); None outside the layers."""
    match = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(match.group(1)) if match else None


def expert_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of one expert of an experts module: `{"down_proj": (hidden, width), ...}`.

    A parameter without a leading expert dimension (the norm after an expert) belongs to each of the experts.
    """
    return {
        name: tuple(parameter.shape[1:] if is_batched(name) else parameter.shape)
        for name, parameter in module.named_parameters()
    }


def is_batched(param: str) -> bool:
    """Whether a parameter of an experts module has a leading expert dimension."""
    return param.removesuffix("_bias") in ("gate_up_proj", "up_proj", "down_proj")


def count_experts(module: nn.Module) -> int:
    """Number of experts in an experts module."""
    return int(module.num_experts)  # type: ignore[arg-type]


def plain_activation(module: nn.Module) -> str | None:
    """The activation's name if a slice is `act(gate) * up` or `act(up)` in plain torch; None if only the module knows.

    Lets a process that only computes slices do without the modeling code, which takes seconds to import.
    """
    if module.has_post_expert_norm or not all(map(is_batched, expert_shapes(module))):
        return None
    if module.has_gate and getattr(type(module), "_apply_gate", None) is not moe._default_apply_gate:
        return None
    return _ACTIVATIONS.get(type(module.act_fn).__name__)


def experts_per_token(config: PretrainedConfig) -> int:
    """Top-k of the router, whatever the family calls it.

    Raises:
        StoreError: the configuration does not say.
    """
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise StoreError(f"'{config.model_type}': config.json does not say how many experts a token uses")


_ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu"}


def _in_short(error: Exception) -> str:
    """The beginning of an error's text; transformers tells stories of many lines."""
    return textwrap.shorten(str(error), 200, placeholder=" ...") or type(error).__name__


def _why_no_experts(model: PreTrainedModel) -> str:
    kind = model.config.model_type
    if any(re.search(r"moe|experts", type(module).__name__, re.IGNORECASE) for module in model.modules()):
        return (
            f"'{kind}' models cannot be served: transformers does not run their experts through its pluggable "
            "experts interface"
        )
    return f"'{kind}' is not a Mixture-of-Experts model (no layer has experts); serve it with a dense engine"


def _other_mixers(config: PretrainedConfig) -> list[str]:
    return sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION_KINDS)


def _has_indexer(config: PretrainedConfig) -> bool:
    return any(hasattr(config, name) for name in ("index_topk", "index_n_heads", "index_topk_blocks"))


def _quantised(config: PretrainedConfig) -> str:
    method = getattr(config, "quantization_config", None)
    name = method.get("quant_method", "unknown") if isinstance(method, dict) else type(method).__name__
    return (
        f"the checkpoint is quantised ({name}); save a dequantised copy with transformers "
        "(from_pretrained with its dequantize option, then save_pretrained) and use that"
    )


def _is_stateful(config: PretrainedConfig) -> bool:
    return bool(getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_is_stateful", False))


# Asked in this order, the first that applies is the reason given.
_Refusal = tuple[Callable[[PretrainedConfig], bool], Callable[[PretrainedConfig], str]]
_REFUSALS: tuple[_Refusal, ...] = (
    (lambda c: getattr(c, "quantization_config", None) is not None, _quantised),
    (lambda c: c.get_text_config() is not c, lambda c: "only text models are, and this one is multi-modal"),
    (lambda c: bool(getattr(c, "is_encoder_decoder", False)), lambda c: "encoder-decoder models are not supported"),
    (
        lambda c: type(c) not in MODEL_FOR_CAUSAL_LM_MAPPING,
        lambda c: "transformers has no causal language model of this type",
    ),
    (  # cannot be built from every configuration, so that its modules could be looked at
        lambda c: c.model_type == "dbrx",
        lambda c: "transformers does not run their experts through its pluggable experts interface",
    ),
    (_has_indexer, lambda c: "sparse attention with an indexer is not supported"),
    (
        lambda c: bool(_other_mixers(c)) or _is_stateful(c),
        lambda c: (
            "layers that keep a state instead of a KV cache are not supported"
            + (f" ({', '.join(_other_mixers(c))})" if _other_mixers(c) else "")
        ),
    ),
)
