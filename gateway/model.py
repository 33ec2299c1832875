"""A model as the gateway holds it: transformers' own modeling code with everything but the experts' weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from experts import kernels
from experts.families import moe_modules
from experts.store import ExpertStore
from gateway import layer_ops
from gateway.attention import Attending, ShapeProbe, paged_attention
from gateway.batch import Batch
from gateway.kv_cache import LayerShape
from gateway.latent import LatentHeads
from gateway.layer_calls import ExpertsFunction, LayerCalls
from gateway.masks import mask_rule
from gateway.packed_linear import pack_linears
from gateway.rope import LengthRope, UnsupportedRopeError, length_rope

_NAME = "evermoe"
_FEW_ROWS = 64


class ModelError(ValueError):
    """A model the gateway cannot run; the message is one line for people."""


def load_model(store: ExpertStore, *, device: torch.device | str = "cpu", experts: ExpertsFunction) -> GatewayModel:
    """Build the model of `store` with its experts answered by `experts`.

    On a CPU the weights are the store's memory-mapped tensors; experts' weights are never read. Raises ModelError for
    a model whose modeling code does not go through transformers' attention and experts registries.
    """
    config = copy.deepcopy(store.config())
    weights = store.gateway_weights()
    network = _skeleton(config, getattr(torch, store.manifest.dtype))
    layers = moe_modules(network)
    _assign(network, {name: tensor.to(device) for name, tensor in weights.items()}, set(layers.values()))
    _move_buffers(network, device)
    return GatewayModel(network, layers, experts, torch.device(device))


class GatewayModel:
    """The network, what it needs cached, and its forward over the flattened rows of a step."""

    def __init__(
        self, network: nn.Module, layers: dict[int, nn.Module], experts: ExpertsFunction, device: torch.device
    ) -> None:
        self.network = network
        self.device = device
        self.dtype = next(p.dtype for p in network.parameters() if not p.is_meta)
        config = network.config
        self.vocab_size: int = config.vocab_size  # type: ignore[assignment,union-attr]
        self.context_length: int = config.max_position_embeddings  # type: ignore[assignment,union-attr]
        self.rope = _rope(network)
        for layer, module in layers.items():
            module.layer, module.answer = layer, self._answer  # type: ignore[assignment]
        self.calls = LayerCalls([], experts)
        self.kv_shapes: dict[int, LayerShape] = {}
        pack_linears(network, lambda: self.kv_shapes.update(self._probe()))
        self.compiled = 0
        """Layers that run compiled."""
        self.threads: int | None = None
        """Threads that share a step; None leaves torch's setting alone."""
        self.between_steps: Callable[[], object] | None = None
        """Called once, before the next forward."""
        self.layers = decoder_layers(network)
        """In order; empty where they can't be told apart."""
        self.calls = LayerCalls(self.layers, experts)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute the batch's rows, cache their keys and values; logits [batch.sample_rows, vocabulary]."""
        if self.between_steps is not None:
            change, self.between_steps = self.between_steps, None
            change()
        self._share(len(batch.token_ids))
        if self.rope is not None:
            self.rope.lengths = batch.lengths
        return self._run(batch.token_ids, batch.positions, batch.sample_rows, batch.attention)

    def _share(self, rows: int) -> None:
        """Torch's own operations on few rows are small: with the kernels there they gain nothing from a second thread.

        Each would end in a barrier, and wait for that thread where another process has its core.
        """
        if self.threads is None:
            return
        alone = kernels.loaded() and rows <= _FEW_ROWS
        torch.set_num_threads(1 if alone else self.threads)
        if kernels.loaded():
            kernels.share(self.threads)

    @torch.inference_mode()
    def _run(
        self, token_ids: torch.Tensor, positions: torch.Tensor, sample_rows: torch.Tensor, attention: Attending
    ) -> torch.Tensor:
        self.calls.step = attention
        with layer_ops.answering(self.calls), self.calls.answered_without_python():
            output = self.network(
                input_ids=token_ids[None],
                position_ids=positions[None],
                past_key_values=_NoCache(),
                use_cache=True,
                output_router_logits=False,
                logits_to_keep=sample_rows,
                attention_step=attention,
            )
        return cast(torch.Tensor, output.logits[0])

    def rehearse(self, rows: int, attention: Attending, experts: ExpertsFunction) -> None:
        """Run `rows` rows of nothing through the layers, with stand-ins for attention and experts."""
        positions = torch.arange(rows, device=self.device)
        if self.rope is not None:
            self.rope.lengths = [rows] * rows
        with self.calls.answered_by(experts):
            self._run(torch.zeros_like(positions), positions, positions[-1:], attention)

    def _answer(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return self.calls.experts(layer, hidden, top_k_index, top_k_weights)

    def _probe(self) -> dict[int, LayerShape]:
        """See what each layer would cache; this also proves that the registries work."""
        probe = ShapeProbe()
        self.rehearse(1, probe, lambda layer, hidden, index, weights: torch.zeros_like(hidden))
        if not probe.shapes:
            raise ModelError(f"{type(self.network).__name__} does not call transformers' attention interface")
        return dict(sorted(probe.shapes.items()))


def decoder_layers(network: nn.Module) -> list[nn.Module]:
    """The network's stack of layers with attention, in the order of their numbers; empty where it has none."""
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(map(_attends, module)):
            return list(module) if all(_numbers(layer) == {index} for index, layer in enumerate(module)) else []
    return []


def _attends(module: nn.Module) -> bool:
    return any(hasattr(m, "layer_idx") for m in module.modules())


def _numbers(layer: nn.Module) -> set[Any]:
    """The numbers by which attention and experts of a layer know it."""
    return {vars(m)[name] for m in layer.modules() for name in ("layer_idx", "layer") if name in vars(m)}


class _NoCache:
    """Satisfies modeling code that asks its cache about lengths; the step's attention does the caching."""

    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return keys, values


def _ask_experts(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    traced = layer_ops.traced_layer()
    if traced is not None:
        return layer_ops.traced_experts(hidden, top_k_index, top_k_weights, traced)
    return cast(torch.Tensor, module.answer(module.layer, hidden, top_k_index, top_k_weights))


# A registry entry is shared by all models of the process; what differs hangs on the modules or travels with the call.
ALL_EXPERTS_FUNCTIONS.register(_NAME, _ask_experts)
ALL_ATTENTION_FUNCTIONS.register(_NAME, paged_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, mask_rule)


def _skeleton(config: Any, dtype: torch.dtype) -> nn.Module:
    """The network with its parameters on the meta device and its buffers real."""
    with _meta_parameters(), no_init_weights():
        network = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=_NAME, experts_implementation=_NAME
        )
    return cast(nn.Module, network.eval().requires_grad_(False))


class _EmptyOnMeta(TorchFunctionMode):
    """Gives uninitialised tensors no memory: a layer's experts alone may be larger than the gateway's."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.empty:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        return func(*args, **(kwargs or {}))


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Put every parameter that this thread registers on the meta device."""
    original = nn.Module.register_parameter
    thread = threading.get_ident()

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and threading.get_ident() == thread:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _assign(network: nn.Module, weights: dict[str, torch.Tensor], experts: set[nn.Module]) -> None:
    """Make `weights` the network's own parameters and buffers, without a copy; raise ModelError for others."""
    unexpected = network.load_state_dict(weights, strict=False, assign=True).unexpected_keys
    network.requires_grad_(False)
    network.tie_weights()  # type: ignore[operator]
    absent = {id(p) for module in experts for p in module.parameters()}
    missing = [n for n, p in network.named_parameters() if p.is_meta and id(p) not in absent]
    kept = set(network.state_dict())
    missing += [n for n, b in network.named_buffers() if b.is_meta or (n in kept and n not in weights)]
    if unexpected or missing:
        name, fault = (missing[0], "lacks") if missing else (unexpected[0], "has an unknown")
        raise ModelError(
            f"the store's gateway weights do not match {type(network).__name__}: it {fault} {name}; prepare it again"
        )
    for module in network.modules():
        if LatentHeads.found_in(module):
            module.latent_heads = LatentHeads(module)  # type: ignore[assignment]


def _move_buffers(network: nn.Module, device: torch.device | str) -> None:
    for module in network.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _rope(network: nn.Module) -> LengthRope | None:
    try:
        return length_rope(network)
    except UnsupportedRopeError as error:
        raise ModelError(f"{type(network).__name__}: {error}") from error
