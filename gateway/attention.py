"""Attention over the paged cache, plugged into transformers' attention registry.

All rows of a step arrive flattened in one batch of 1. `AttentionStep` knows which rows belong together: decoding
sequences of alike length are one batched product, a chunk of a prompt is another. It travels as a keyword argument
through the model's forward, so nothing here is global.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from gateway import paged_decode
from gateway.kv_cache import KVCache, LayerShape
from gateway.latent import LatentHeads
from gateway.masks import MaskRule
from gateway.row_groups import Chunk, RowGroup, group_rows


class Attending(Protocol):
    """What `paged_attention` hands each layer's rows to."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: MaskRule,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Queries [Hq, T, Dk], keys [Hkv, T, Dk], values [Hkv, T, Dv] of the step's rows to outputs [T, Hq, Dv].

        `values` may be the very tensor `keys`: then they are cached once.
        """
        ...


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskRule,
    *,
    attention_step: Attending,
    scaling: float | None = None,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, H, T, D] in, ([1, T, Hq, Dv], None) out; `s_aux` are per-head sinks."""
    if softcap is not None:
        raise NotImplementedError("attention with soft-capped scores is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, keys, values = query[0], key[0], value[0]
    latent: LatentHeads | None = getattr(module, "latent_heads", None)
    if latent is not None:
        queries = latent.absorb(queries)
        keys = values = torch.cat((keys, values), dim=-1)
    out = attention_step.attend(module.layer_idx, queries, keys, values, attention_mask, scale, s_aux)  # type: ignore[arg-type]
    if latent is not None:
        out = latent.expand(out)
    return out[None], None


class AttentionStep:
    """One step's attention: write the new rows' keys and values, then read what each row may see."""

    def __init__(self, cache: KVCache, chunks: Sequence[Chunk], device: torch.device | str = "cpu") -> None:
        """`chunks` in the order of the step's rows; single rows of one length class should be neighbours."""
        self._cache = cache
        slots = [slot for chunk in chunks for slot in cache.slots(chunk.table, chunk.start, chunk.count)]
        self._slots = torch.tensor(slots, device=device)
        # The kernel reads each sequence as far as it goes; gathered, unlike lengths would be padding.
        self._groups = group_rows(chunks, cache.block_size, device, by_length=not paged_decode.loaded())
        self._masks: dict[tuple[MaskRule, int], torch.Tensor | None] = {}

    def hand_over(self, layers: int, causal: Collection[int]) -> bool:
        """Let compiled layers attend without Python, if all rows decode; of `layers` those that are `causal`."""
        if not layers or not paged_decode.loaded() or len(self._groups) != 1 or not self._groups[0].decodes:
            return False
        group, pools = self._groups[0], []
        for layer in range(layers):
            pair = self._cache.pools(layer) if layer in causal and layer in self._cache.shapes else None
            pools.append(pair if pair and paged_decode.takes(*pair) else (paged_decode.NOTHING, paged_decode.NOTHING))
        paged_decode.answer_attention(self._slots, group.blocks, group.lengths, *zip(*pools, strict=True))
        return True

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: MaskRule,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `Attending`."""
        self._cache.write(layer, self._slots, keys, values)
        by_head = query.view(
            keys.shape[0], -1, *query.shape[1:]
        )  # [Hkv, G, T, Dk]: the G heads that share keys side by side
        head_sinks = None if sinks is None else sinks.view(keys.shape[0], -1)
        outputs = [
            self._attend_group(layer, index, by_head[:, :, group.rows], rule, scaling, head_sinks)
            for index, group in enumerate(self._groups)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend_group(
        self,
        layer: int,
        index: int,
        query: torch.Tensor,
        rule: MaskRule,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Queries [Hkv, G, rows, Dk] of one group to outputs [rows, Hq, Dv]."""
        group = self._groups[index]
        keys, values = self._cache.pools(layer)
        if group.decodes and paged_decode.takes(keys, values):
            every = None if sinks is None else sinks.flatten().float()
            mask = None if rule.is_causal else self._mask(rule, index, torch.float32)
            return paged_decode.paged_decode(
                query.flatten(0, 1), keys, values, group.blocks, group.lengths, scaling,
                None if mask is None else mask.flatten(0, 2), every,
            )  # fmt: skip
        return self._attend_gathered(layer, index, query, rule, scaling, sinks)

    def _attend_gathered(
        self,
        layer: int,
        index: int,
        query: torch.Tensor,
        rule: MaskRule,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same over copies of the sequences' blocks."""
        group = self._groups[index]
        keys, values = self._cached(layer, group)  # [Hkv, B, S, D]
        if group.decodes:  # a product per sequence: its heads of one group are the rows
            mask = self._mask(rule, index, query.dtype)
            sinks = None if sinks is None else sinks[:, None, :]
            return _mix(query.transpose(1, 2), keys, values, mask, scaling, sinks).transpose(0, 1).flatten(1, 2)
        heads, by_sequence = keys.shape[:2]
        split = torch.unflatten(query, 2, (by_sequence, group.count)).transpose(1, 2).flatten(0, 1)
        shared = (-1, query.shape[1], -1, -1)
        keys, values = (kept.flatten(0, 1)[:, None].expand(shared) for kept in (keys, values))
        causal = rule.is_causal and group.from_start and sinks is None  # the kernel then skips what nobody sees
        mask = None if causal else self._mask(rule, index, query.dtype)
        if mask is not None and by_sequence > 1:
            mask = mask.transpose(0, 1).repeat(heads, 1, 1, 1)
        if sinks is not None:
            sinks = sinks.repeat_interleave(by_sequence, 0)[:, :, None]
        mixed = _mix(split, keys, values, mask, scaling, sinks, causal=causal)
        return torch.unflatten(mixed, 0, (heads, by_sequence)).permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(1, 2)

    def _cached(self, layer: int, group: RowGroup) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the group's sequences, each [Hkv, B, S, D]."""
        keys, values = self._cache.read(layer, group.blocks.flatten())
        heads, by_sequence = keys.shape[0], group.blocks.shape[0]
        keys = keys.view(heads, by_sequence, -1, keys.shape[-1])[:, :, : group.keys]
        return keys, values.view(heads, by_sequence, -1, values.shape[-1])[:, :, : group.keys]

    def _mask(self, rule: MaskRule, index: int, dtype: torch.dtype) -> torch.Tensor | None:
        """What to add to the group's scores, worked out once a step; None where every row sees every key."""
        if (rule, index) not in self._masks:
            self._masks[rule, index] = _additive(rule, self._groups[index], dtype)
        return self._masks[rule, index]


class ShapeProbe:
    """Stands in for a step and notes what each layer would cache."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rule: MaskRule,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `Attending`; the outputs are zeros."""
        self.shapes[layer] = LayerShape(keys.shape[0], keys.shape[-1], values.shape[-1], values_in_keys=keys is values)
        return query.new_zeros(query.shape[1], query.shape[0], values.shape[-1])


def _additive(rule: MaskRule, group: RowGroup, dtype: torch.dtype) -> torch.Tensor | None:
    """0 or -inf for each score: [1, B, n, S]."""
    if rule.is_causal and group.positions.numel() == 1:
        return None  # a single row sees all of its own sequence
    allowed = rule.allowed(group.positions, group.keys)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))
    return mask[None]


def _mix(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor | None,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(query @ keys * scaling + mask) @ values, all [X, Y, rows or keys, D]; `sinks` broadcasts to [X, Y, rows].

    A sink is one more term of the softmax that carries no value: it scales the row by its share of the sum.
    """
    if sinks is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling, is_causal=causal)
    mixed, log_sums = _mix_with_sums(query, keys, values, mask, scaling)
    return mixed * torch.sigmoid(log_sums - sinks.float())[..., None].to(mixed.dtype)


def _mix_with_sums(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, and the logarithm of each row's softmax denominator [X, Y, rows] in fp32."""
    if query.device.type == "cpu":
        mixed, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, keys, values, attn_mask=mask, scale=scaling
        )
        return mixed, log_sums
    return _mix_by_scores(query, keys, values, mask, scaling)


def _mix_by_scores(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where no kernel tells its sums: holds all scores at once."""
    scores = (query @ keys.transpose(-1, -2)).float() * scaling
    if mask is not None:
        scores = scores + mask
    return scores.softmax(dim=-1).to(values.dtype) @ values, scores.logsumexp(dim=-1)
