"""What a checkpoint does on held-out text: loss, routing and samples."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from deploy.model.batches import MIXTURE, token_streams, windows
from deploy.model.corpus import Kind, documents
from deploy.model.network import EXPERTS, LAYERS, RouterWatch


@dataclass(frozen=True)
class Measurement:
    """What a checkpoint does on held-out text."""

    loss: Mapping[Kind, float]
    """Mean cross-entropy by kind, nats per token."""
    loss_by_position: Mapping[str, float]
    """The same by position inside the window, over all kinds."""
    shares: Mapping[Kind, torch.Tensor]
    """Routing of each kind: share of a layer's rows each expert received, [layers, experts], rows sum to 1."""
    tokens: int
    """Held-out tokens measured."""

    @property
    def mixed_loss(self) -> float:
        """Loss over the training mixture of kinds."""
        return sum(MIXTURE[kind] * loss for kind, loss in self.loss.items())

    @property
    def mixed_shares(self) -> torch.Tensor:
        """Routing over the training mixture of kinds, [layers, experts]."""
        return torch.stack([MIXTURE[kind] * share for kind, share in self.shares.items()]).sum(dim=0)

    def distances(self) -> dict[tuple[Kind, Kind], list[float]]:
        """Total-variation distance (0 equal, 1 disjoint) between the routings of two kinds, one per layer."""
        return {
            (a, b): ((self.shares[a] - self.shares[b]).abs().sum(dim=-1) / 2).tolist()
            for a, b in itertools.combinations(self.shares, 2)
        }


def load(folder: Path) -> tuple[Qwen3MoeForCausalLM, PreTrainedTokenizerFast]:
    """Load a checkpoint the way anybody would, in its own bf16."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def held_out_windows(tokenizer: PreTrainedTokenizerFast, count: int, length: int) -> dict[Kind, torch.Tensor]:
    """Up to `count` windows of held-out tokens of each kind: kind -> [count, length + 1]; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    streams = token_streams(documents("held-out"), tokenizer, generator, cut=False)
    return {
        kind: torch.stack(list(itertools.islice(windows(streams[kind], length + 1, generator), count)))
        for kind in MIXTURE
    }


@torch.inference_mode()
def measure(model: Qwen3MoeForCausalLM, batches: Mapping[Kind, torch.Tensor]) -> Measurement:
    """Run the model over windows [count, length + 1] of each kind, one window at a time."""
    losses: dict[Kind, torch.Tensor] = {}
    shares: dict[Kind, torch.Tensor] = {}
    for kind, rows in batches.items():
        counts, each = torch.zeros(LAYERS, EXPERTS), []
        with RouterWatch(model) as watch:
            for row in rows:
                logits = model(row[None, :-1], use_cache=False).logits[0]
                each.append(F.cross_entropy(logits.float(), row[1:], reduction="none"))
                counts += torch.stack([chosen.flatten().bincount(minlength=EXPERTS) for chosen in watch.chosen])
        losses[kind], shares[kind] = torch.stack(each), counts / counts.sum(dim=1, keepdim=True)
    everything = torch.cat(list(losses.values()))
    return Measurement(
        loss={kind: float(each.mean()) for kind, each in losses.items()},
        loss_by_position=_by_position(everything),
        shares=shares,
        tokens=everything.numel(),
    )


def _by_position(losses: torch.Tensor) -> dict[str, float]:
    """Mean of losses [windows, length] over the positions 0-15, 16-63, 64-255, ... as far as they go."""
    edges = [0, 16, 64, 256, 1024, losses.shape[1]]
    return {f"{a}-{b - 1}": float(losses[:, a:b].mean()) for a, b in itertools.pairwise(edges) if a < b}


@torch.inference_mode()
def complete(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, tokens: int) -> str:
    """The model's most likely continuation of a prompt, chat markers kept visible."""
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        do_sample=False,
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def answer(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str, tokens: int) -> str:
    """The model's most likely answer to one question asked through the chat template."""
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return complete(model, tokenizer, str(prompt), tokens)
