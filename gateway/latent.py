"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) on cached latents, with the up-projections absorbed.

A head's key is `up_keys[h] @ latent` beside a rotary part that all heads share, its value `up_values[h] @ latent`.
Scores are therefore products of `up_keys[h].T @ query` with the latents themselves: latent attention is grouped-query
attention with a single head of keys `[latent, rotary]` whose values are the latents, and the cache holds
`kv_lora_rank + rope` numbers per token instead of all heads' keys and values.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn


class LatentHeads:
    """The up-projections of one attention module, on both sides of attention over latents.

    From then on the module hands its latents to the attention function as they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self._rank: int = module.kv_lora_rank  # type: ignore[assignment]
        self._nope: int = module.qk_nope_head_dim  # type: ignore[assignment]
        self._module = module
        module.expand_kv = lambda latent, rotary: (latent, rotary)  # type: ignore[assignment]

    @property
    def _heads(self) -> torch.Tensor:
        """[H, nope + v_head_dim, rank]; read from the module, which may be traced with others in place of its own."""
        weight: torch.Tensor = self._module.kv_b_proj.weight  # type: ignore[union-attr,assignment]
        return weight.view(cast(int, self._module.num_heads), -1, self._rank)

    @staticmethod
    def found_in(module: nn.Module) -> bool:
        """Whether `module` is latent attention of the shape handled here."""
        projection = getattr(module, "kv_b_proj", None)
        return hasattr(module, "expand_kv") and isinstance(projection, nn.Linear) and projection.bias is None

    def absorb(self, query: torch.Tensor) -> torch.Tensor:
        """Queries [H, T, nope + rope] to queries of latents [H, T, rank + rope]."""
        plain, rotary = query[..., : self._nope], query[..., self._nope :]
        up_keys = self._heads[:, : self._nope]  # [H, nope, rank]
        return torch.cat((plain @ up_keys, rotary), dim=-1)

    def expand(self, mixed: torch.Tensor) -> torch.Tensor:
        """Mixed keys [T, H, rank + rope], of which the latents are the values, to head outputs [T, H, v_head_dim]."""
        up_values = self._heads[:, self._nope :].transpose(1, 2)  # [H, rank, v_head_dim]
        values: torch.Tensor = mixed[..., : self._rank].transpose(0, 1) @ up_values
        return values.transpose(0, 1)
