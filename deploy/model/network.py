"""The network: transformers' own Qwen3-MoE, with experts and a balance loss made for training on a CPU."""

from functools import partial
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from deploy.model.tokenizer import CONTEXT, END_OF_TEXT, END_OF_TURN

LAYERS, EXPERTS, TOP_K = 4, 8, 2


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """A bf16 model with fresh weights drawn from torch's global generator, set up for training."""
    stops = tokenizer.convert_tokens_to_ids([END_OF_TEXT, END_OF_TURN])
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=512,  # unused: every layer is a mixture of experts
        moe_intermediate_size=256,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=stops,
        pad_token_id=None,  # end of text also separates documents: as padding, its embedding would not be trained
        dtype=torch.bfloat16,
    )
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=stops[0])
    ALL_EXPERTS_FUNCTIONS.register("sorted_rows", sorted_experts)
    model.set_experts_implementation("sorted_rows")
    return model


class RouterWatch:
    """Reads every layer's routing while the model runs; a context manager.

    After a forward pass `logits[layer]` is [T, experts] and `chosen[layer]` is [T, top_k] int64.
    """

    def __init__(self, model: Qwen3MoeForCausalLM) -> None:
        self._routers = [layer.mlp.gate for layer in model.model.layers]
        self._handles: list[RemovableHandle] = []
        self.logits: list[torch.Tensor] = [torch.empty(0)] * len(self._routers)
        self.chosen: list[torch.Tensor] = [torch.empty(0)] * len(self._routers)

    def __enter__(self) -> Self:
        """Start watching."""
        for layer, router in enumerate(self._routers):
            self._handles.append(router.register_forward_hook(partial(self._record, layer)))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def _record(self, layer: int, _module: nn.Module, _inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
        self.logits[layer], _, self.chosen[layer] = outputs


def band_loss(logits: torch.Tensor, chosen: torch.Tensor, *, low: float, high: float) -> torch.Tensor:
    """Push loads back into a band around the mean: logits [T, E], chosen experts [T, K] -> scalar.

    The usual auxiliary loss (Fedus et al., "Switch Transformers", 2021) pulls all loads towards equality: too little of
    it and the deeper layers collapse onto two experts, enough of it and the load is nearly even, and an example of
    skewed expert load is gone. This one uses the same product of load and mean probability, but only for the part of a
    load that lies outside `low` to `high` times the mean, and leaves the router free inside.
    """
    experts = logits.shape[-1]
    load = chosen.flatten().bincount(minlength=experts) * (experts / chosen.numel())
    excess = (load - high).clamp_min(0) - (low - load).clamp_min(0)
    return (excess * logits.float().softmax(dim=-1).mean(dim=0)).sum()


def permute_rows(rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return rows [N, H] in the given order [N]; `inverse` [N] undoes it.

    The gradient is another gather; that of general indexing is many times slower on a CPU.
    """
    permuted: torch.Tensor = _PermuteRows.apply(rows, order, inverse)  # type: ignore[no-untyped-call]
    return permuted


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0].index_select(0, inverse), None, None


def sorted_experts(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Run experts on rows sorted by expert: [T, H], [T, K], [T, K] -> [T, H].

    An experts function in the sense of transformers' registry. One matrix product per expert and projection, and
    weights unbound rather than indexed, so that backward stacks eight gradients instead of adding eight full tensors.
    """
    tokens, width = hidden.shape
    order = top_k_index.flatten().argsort(stable=True)
    inverse = order.argsort()
    counts = top_k_index.flatten().bincount(minlength=EXPERTS).tolist()
    copies = hidden[:, None].expand(tokens, TOP_K, width).reshape(-1, width)
    parts = torch.split(permute_rows(copies, order, inverse), counts)
    outputs = []
    gate_ups, downs = module.gate_up_proj.unbind(), module.down_proj.unbind()
    for part, gate_up, down in zip(parts, gate_ups, downs, strict=True):
        gate, up = F.linear(part, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, down))
    back = permute_rows(torch.cat(outputs), inverse, order).view(tokens, TOP_K, width)
    return (back * top_k_weights[..., None]).sum(dim=1)


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of a linear head: hidden [T, H], weights [V, H], target ids [T] -> float32 scalar.

    Computed together with its gradients, a slice of rows at a time: the logits of a whole batch are a hundred megabytes
    of freshly mapped memory, which cost more than the arithmetic.
    """
    loss: torch.Tensor = _HeadLoss.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    ROWS = 256

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        total = hidden.new_zeros((), dtype=torch.float32)
        size = _HeadLoss.ROWS
        slices = zip(*(torch.split(tensor, size) for tensor in (hidden, targets, hidden_grad)), strict=True)
        for rows, wanted, rows_grad in slices:
            log_odds = F.linear(rows, weight).float().log_softmax(dim=-1)
            wanted = wanted[:, None]
            total -= log_odds.gather(1, wanted).sum()
            error = log_odds.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1.0, dtype=torch.float32))
            error = (error / len(hidden)).to(weight.dtype)
            torch.mm(error, weight, out=rows_grad)
            weight_grad += error.t() @ rows
        ctx.save_for_backward(hidden_grad, weight_grad.to(weight.dtype))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * gradients[0], weight_grad * gradients[0], None
