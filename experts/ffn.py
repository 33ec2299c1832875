"""The arithmetic of a slice: rows through one expert of one layer, for any family.

Common families (SwiGLU) are plain torch here, without transformers: importing modeling code costs a replica seconds and
a hundred megabytes. Gates that only the family knows (interleaved, clamped) and norms after an expert are asked of the
family's own experts module, built on the meta device.
"""

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from experts import kernels
from experts.manifest import SliceForm
from experts.mapped import trim
from experts.matrix import FastMatrix, PlainMatrix, packable
from experts.store import ExpertStore
from experts.tally import Tally

_ACTIVATIONS = {"silu": F.silu}


@dataclass(frozen=True)
class SliceWeights:
    """The two products of one slice, rows `[T, in]` to `[T, out]`; `up` is gate and up projection together if gated."""

    up: PlainMatrix
    down: PlainMatrix

    @classmethod
    def of(cls, params: dict[str, torch.Tensor], form: SliceForm, *, fast: bool) -> "SliceWeights":
        """From a slice's parameters as the store names them: views of them, or `fast` matrices."""
        name = "gate_up_proj" if form.gated else "up_proj"
        return cls(
            *(
                _product(params[weight], params.get(f"{weight}_bias"), form.transposed, fast)
                for weight in (name, "down_proj")
            )
        )

    @property
    def nbytes(self) -> int:
        """Memory that the slice takes."""
        return self.up.nbytes + self.down.nbytes


class ExpertFFN:
    """The pure function of a slice on `device`, for the slices (layer, expert) that are loaded.

    On a CPU the weights stay memory-mapped: loading costs no memory but pages that all processes share, and `unload`
    gives those back. `fast` ones (see `FastMatrix`) are copied where our kernels are not built. Other devices get a
    copy. Slices may be loaded and unloaded while other threads compute.
    """

    def __init__(self, store: ExpertStore, device: torch.device | str = "cpu", *, fast: bool = False) -> None:
        self.device = torch.device(device)
        self._fast = fast
        form = store.manifest.form
        self._fusable = form.gated and form.activation == "silu" and not form.bias and not form.normed
        self._store = store
        self._form = store.manifest.form
        self._slices: dict[tuple[int, int], SliceWeights] = {}
        self._wholes: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        """Layer -> both weights of all its experts, where all are loaded and the kernel takes them."""
        self._changing = threading.Lock()
        self.tally = Tally()
        """Of calls answered by `serve`."""
        self._modules = {} if self._form.activation else _experts_modules(store)

    @property
    def loaded(self) -> frozenset[tuple[int, int]]:
        """Slices that are loaded now."""
        return frozenset(self._slices)

    @property
    def resident_bytes(self) -> int:
        """Memory that they take, on the host or on the device."""
        return sum(weights.nbytes for weights in list(self._slices.values()))

    def load(self, layer: int, expert: int) -> None:
        """Map the slice's weights, or copy them to the device; nothing happens if that was done.

        Raises:
            StoreError: there is no such expert, or its file is damaged.
            LookupError: `layer` has no experts.
        """
        if (layer, expert) not in self._slices:
            self._load(layer, expert)

    def unload(self, slices: Collection[tuple[int, int]]) -> None:
        """Let go of the weights of those `slices` that are loaded; calls under way keep theirs until they end."""
        if not slices:
            return
        with self._changing:
            gone = [self._slices.pop((layer, expert), None) for layer, expert in slices]
            for layer, _ in slices:
                self._wholes.pop(layer, None)
            self.tally.change()
        if not any(weights is not None for weights in gone):
            return
        gone.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self._fast:
            trim()

    def __call__(self, layer: int, expert: int, rows: torch.Tensor) -> torch.Tensor:
        """The expert's output `[T, H]` for `rows [T, H]`, without router weights; see `compute`."""
        out = torch.empty_like(rows)
        self.compute(layer, [(expert, len(rows))], rows, out)
        return out

    @torch.no_grad()
    def compute(self, layer: int, segments: Sequence[tuple[int, int]], rows: torch.Tensor, out: torch.Tensor) -> None:
        """Write into `out [N, H]` what the experts of `layer` make of `rows [N, H]`, without router weights.

        `segments` are (expert, number of rows), in the order of the rows; `rows` have the model's dtype, and `out` too.
        An expert that is not loaded is loaded first.

        Raises:
            LookupError: `layer` has no experts.
            ValueError: the segments do not cover the rows.
            StoreError: there is no such expert, or its file is damaged.
        """
        if sum(count for _, count in segments) != len(rows):
            raise ValueError(f"segments {segments} do not add up to {len(rows)} rows")
        weights = [self._slice(layer, expert) for expert, _ in segments]
        counts = [count for _, count in segments]
        if rows.device == self.device == out.device:
            self._compute(layer, counts, weights, rows, out)
        else:
            result = torch.empty_like(rows, device=self.device)
            self._compute(layer, counts, weights, rows.to(self.device), result)
            out.copy_(result)

    @torch.no_grad()
    def mixture(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """Rows `hidden [T, H]` through the experts `index [T, K]`, summed by `weights [T, K]`, in a single call.

        None where the compiled kernel does not compute that: an expert of the model is not loaded, or of another form.
        """
        whole = self._wholes.get(layer) or self._whole(layer, hidden)
        if whole is None or not kernels.few(len(hidden)):
            return None
        up, down = whole
        return kernels.mixture(hidden.contiguous(), index.contiguous(), weights, up, down)

    def _whole(self, layer: int, hidden: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
        """Both weights of all experts of `layer`; None where one is not loaded, or the kernel does not take it."""
        with self._changing:
            every = []
            for expert in range(self._store.manifest.num_experts):
                weights = self._slices.get((layer, expert))
                if weights is None or not self._fuses(weights, hidden):
                    return None
                every.append(weights)
            self._wholes[layer] = [s.up.weight for s in every], [s.down.weight for s in every]
            return self._wholes[layer]

    def serve(self, descriptor: int, arena: int, memory: torch.Tensor) -> None:
        """Answer calls of slices that are loaded, as they come on a descriptor, until others are; see `kernels.serve`.

        Nothing happens where the compiled kernel does not compute them.
        """
        stamp = self.tally.stamp
        slices = dict(self._slices)
        dtype = getattr(torch, self._store.manifest.dtype)
        sample = torch.empty(1, self._store.manifest.hidden_size, dtype=dtype)
        if slices and all(self._fuses(weights, sample) for weights in slices.values()):
            up, down = [w.up.weight for w in slices.values()], [w.down.weight for w in slices.values()]
            kernels.serve(descriptor, arena, memory, slices, up, down, self.tally.numbers, stamp)

    def _compute(
        self, layer: int, counts: list[int], weights: list[SliceWeights], rows: torch.Tensor, out: torch.Tensor
    ) -> None:
        if not weights:
            return
        if self._fuses(weights[0], rows):
            kernels.expert_ffn(rows, counts, [w.up.weight for w in weights], [w.down.weight for w in weights], out)
            return
        # All first products, one activation for all rows, all second products: fewer and longer operations.
        parts = torch.split_with_sizes(rows, counts)
        inner = _join([slice_.up(part) for slice_, part in zip(weights, parts, strict=True)])
        parts = torch.split_with_sizes(self._activate(layer, inner), counts)
        torch.cat([slice_.down(part) for slice_, part in zip(weights, parts, strict=True)], out=out)
        if self._form.normed:
            out.copy_(self._modules[layer].post_expert_norm(out))  # type: ignore[operator]

    def _fuses(self, weights: SliceWeights, rows: torch.Tensor) -> bool:
        """Whether the compiled kernel computes such slices, and is the fastest way for `rows`."""
        both = (weights.up, weights.down)
        return self._fusable and all(isinstance(matrix, FastMatrix) and matrix.streams(rows) for matrix in both)

    def _activate(self, layer: int, inner: torch.Tensor) -> torch.Tensor:
        activation = _ACTIVATIONS.get(self._form.activation or "")
        if activation is not None and self._form.gated:
            gate, up = inner.chunk(2, dim=-1)
            return activation(gate).mul_(up)
        if activation is not None:
            return activation(inner)
        module = self._modules[layer]
        apply = module._apply_gate if self._form.gated else module.act_fn
        result: torch.Tensor = apply(inner)  # type: ignore[operator]
        return result

    def _slice(self, layer: int, expert: int) -> SliceWeights:
        # Else not loaded yet, or unloaded by another thread a moment ago.
        return self._slices.get((layer, expert)) or self._load(layer, expert)

    def _load(self, layer: int, expert: int) -> SliceWeights:
        params = {name: tensor.to(self.device) for name, tensor in self._store.slice(layer, expert).items()}
        if self._modules:
            _give_shared(self._modules[layer], params)
        weights = SliceWeights.of(params, self._form, fast=self._fast)
        if self._fast:
            weights.up.make_ready()
            weights.down.make_ready()
        with self._changing:
            self.tally.change()
            return self._slices.setdefault((layer, expert), weights)


def _product(weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool, fast: bool) -> PlainMatrix:
    """The product with `weight`, `[out, in]` or, `transposed`, `[in, out]`."""
    plain = weight.t() if transposed else weight
    if kernels.multiplies(plain) or (fast and packable(plain)):
        return FastMatrix(plain, bias)
    return PlainMatrix(plain, bias)


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _experts_modules(store: ExpertStore) -> dict[int, nn.Module]:
    """The family's experts modules by layer, without weights."""
    from experts import families

    return families.moe_modules(families.meta_model(store.config(), getattr(torch, store.manifest.dtype)))


def _give_shared(module: nn.Module, params: dict[str, torch.Tensor]) -> None:
    """Give an experts module the parameters that all its experts have in common."""
    from experts import families

    for name, tensor in params.items():
        if not families.is_batched(name):
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, nn.Parameter(tensor.clone(), requires_grad=False))
