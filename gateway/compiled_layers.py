"""Decoder layers compiled ahead of time, in another process, while the gateway serves with the modeling code as it is.

Half of a decode step's time outside the experts is the overhead of many small operations. `torch.export` and
AOTInductor make one library of everything between a layer's products, attention and experts (see `gateway.layer_ops`);
layers of one kind share it. A layer is taken over only when its compiled form gives the same numbers.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils import _pytree as pytree

from experts import native_code
from gateway import layer_ops
from gateway.masks import MaskRule
from gateway.packed_linear import number_products

_SCALARS = (bool, int, float, str, type(None))
_NUMBERS_OF_ITS_OWN = ("layer_idx", "layer", "training")
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
_TRIES = {1: 16, 3: 8, 32: 1}
"""Rows -> how often a compiled layer is compared with so many."""
_ALIKE = 0.75
"""Rows that must agree: another rounding sends some to another expert."""


class UncompilableError(Exception):
    """A layer that can't be compiled; the message says why."""


@dataclass(frozen=True)
class CallPattern:
    """How the model calls its decoder layers: which arguments are tensors, and along which dimensions they grow."""

    leaves: tuple[Any, ...]
    spec: Any
    tensors: tuple[int, ...]
    """Leaves that are tensors."""
    growing: tuple[tuple[int, ...], ...]
    """For each tensor its dimensions as long as the step has rows."""
    rule: int | None
    """The leaf that is the mask rule."""
    tuple_out: bool
    """The layer returns a tuple of one tensor instead of the tensor."""

    def reader(self, leaf: int) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
        """What finds a leaf among the arguments of a call."""
        numbered = pytree.tree_unflatten(range(len(self.leaves)), self.spec)
        path = next(path for path, number in pytree.tree_leaves_with_path(numbered) if number == leaf)
        steps: list[Any] = [getattr(step, "key", getattr(step, "idx", None)) for step in path]
        side, key, *rest = steps

        def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found = kwargs[key] if side else args[key]
            for step in rest:
                found = found[step]
            return found

        return read


def patterns(layers: list[nn.Module], run: Callable[[int], object]) -> list[CallPattern | UncompilableError]:
    """Watch two forwards, of 2 and of 3 rows (`run` takes their number), and note how each layer is called."""
    seen: list[list[tuple[list[Any], Any, Any]]] = [[] for _ in layers]

    def watch(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        return lambda module, args, kwargs, out: seen[index].append((*pytree.tree_flatten((args, kwargs)), out))

    hooks = [layer.register_forward_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        run(2)
        run(3)
    finally:
        for hook in hooks:
            hook.remove()
    return [_pattern_or_reason(calls) for calls in seen]


def _pattern_or_reason(calls: list[tuple[list[Any], Any, Any]]) -> CallPattern | UncompilableError:
    try:
        if len(calls) != 2:
            raise UncompilableError("the model does not call each of its layers once")
        return _pattern(*calls)
    except UncompilableError as reason:
        return reason


def _pattern(two: tuple[list[Any], Any, Any], three: tuple[list[Any], Any, Any]) -> CallPattern:
    (leaves, spec, out), (others, other_spec, _) = two, three
    if spec != other_spec:
        raise UncompilableError("the model calls its layers in different ways")
    tuple_out = isinstance(out, tuple)
    if not isinstance(out[0] if tuple_out and len(out) == 1 else out, torch.Tensor):
        raise UncompilableError("a layer returns more than its rows")
    tensors = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    return CallPattern(
        leaves=tuple(leaves),
        spec=spec,
        tensors=tensors,
        growing=tuple(
            tuple(d for d, (a, b) in enumerate(zip(leaves[i].shape, others[i].shape, strict=True)) if (a, b) == (2, 3))
            for i in tensors
        ),
        rule=next((i for i, leaf in enumerate(leaves) if isinstance(leaf, MaskRule)), None),
        tuple_out=tuple_out,
    )


class _TracingStep:
    """Stands in for a step's attention while a layer is traced."""

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
        traced = layer_ops.traced_layer()
        assert traced is not None
        return layer_ops.traced_attend(query, keys, values, traced, scaling, sinks)


class _Traceable(nn.Module):
    """A layer as a function of tensors only, the last of them the layer's number."""

    def __init__(self, layer: nn.Module, pattern: CallPattern) -> None:
        super().__init__()
        self.layer = layer
        self._pattern = pattern

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        leaves = [_TracingStep() if hasattr(leaf, "attend") else leaf for leaf in self._pattern.leaves]
        for place, tensor in zip(self._pattern.tensors, tensors[:-1], strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._pattern.spec)
        with layer_ops.tracing(tensors[-1]):
            out = self.layer(*args, **kwargs)
        result: torch.Tensor = out[0] if self._pattern.tuple_out else out
        return result


def signature(layer: nn.Module, pattern: CallPattern) -> str:
    """Names what a compiled layer depends on: equal for layers that can share one."""
    parts: list[Any] = [native_code.made_for(), transformers.__version__]
    parts += [_sources(), pattern.spec, pattern.growing, pattern.tuple_out]
    parts += [leaf if isinstance(leaf, _SCALARS) else type(leaf).__name__ for leaf in pattern.leaves]
    for name, module in layer.named_modules():
        plain = {k: v for k, v in sorted(vars(module).items()) if isinstance(v, _SCALARS)}
        parts.append((name, type(module).__qualname__, [i for i in plain.items() if i[0] not in _NUMBERS_OF_ITS_OWN]))
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        parts.append((name, tuple(tensor.shape), str(tensor.dtype)))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _sources() -> str:
    """What our own part of a compiled layer is made of."""
    digest = hashlib.sha256()
    for name in ("compiled_layers", "layer_ops", "attention", "latent", "packed_linear", "model"):
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()


def export(layer: nn.Module, pattern: CallPattern) -> torch.export.ExportedProgram:
    """The layer as a program for any number of rows: the pattern's tensors and the layer's number to its rows."""
    number_products(layer)
    tensors = [
        _grown(pattern.leaves[i], growing, 8) for i, growing in zip(pattern.tensors, pattern.growing, strict=True)
    ]
    shapes = [dict.fromkeys(growing, torch.export.Dim.DYNAMIC) or None for growing in pattern.growing]
    with torch.no_grad():
        return torch.export.export(
            _Traceable(layer, pattern), (*tensors, torch.tensor(0)), dynamic_shapes=((*shapes, None),)
        )


def package(layer: nn.Module, pattern: CallPattern, folder: Path) -> None:
    """Compile `layer` into `folder`, whole or not at all; takes ten seconds of a core."""
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=folder.parent, suffix=f".{os.getpid()}") as aside:
        archive = f"{aside}/layer.pt2"
        torch._inductor.aoti_compile_and_package(
            export(layer, pattern),
            package_path=archive,
            inductor_configs={
                "aot_inductor.package_constants_in_so": False,
                # Small ones are written into the code otherwise, and other layers have others.
                "always_keep_tensor_constants": True,
                # One: what is left between the products is small, and waking a second thread costs more than it is.
                "cpp.threads": 1,
            },
        )
        # Unpacked once: packed, it would be unpacked by every process that loads it, for each of its layers.
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(f"{aside}/unpacked")
        next(Path(aside, "unpacked").iterdir()).rename(folder)


def _grown(tensor: torch.Tensor, growing: tuple[int, ...], rows: int) -> torch.Tensor:
    """A tensor like one that was seen, with `rows` rows."""
    shape = [rows if d in growing else size for d, size in enumerate(tensor.shape)]
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return torch.randn(shape, dtype=torch.cfloat if tensor.is_complex() else None).to(tensor.dtype)
    return torch.arange(rows, dtype=tensor.dtype).expand(shape).clone()


class CompiledLayer:
    """Takes the place of a layer's forward."""

    def __init__(self, layer: nn.Module, index: int, pattern: CallPattern, folder: Path, note: NoteRule) -> None:
        """Load `folder` with the layer's own weights; raise UncompilableError where they do not go together."""
        runner = torch._C._aoti.AOTIModelPackageLoader(str(folder), "model", False, 1, -1)
        held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        names = {name: name.removeprefix("layer.") for name in runner.get_constant_fqns()}
        unknown = [name for name, own in names.items() if own not in held]
        if unknown:
            raise UncompilableError(f"it has a constant of its own ({unknown[0]})")
        self._weights = {name: held[own].detach() for name, own in names.items()}
        runner.load_constants(self._weights, False, True, True)
        self._run = runner.run
        self._tuple_out = pattern.tuple_out
        self._tensors = [pattern.reader(leaf) for leaf in pattern.tensors]
        self._rule = None if pattern.rule is None else pattern.reader(pattern.rule)
        self._index = index
        self._layer = torch.tensor(index)
        self._note = note

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward, by compiled code."""
        if self._rule is not None:
            self._note(self._index, self._rule(args, kwargs))
        out = self._run([*[read(args, kwargs) for read in self._tensors], self._layer])[0]
        return (out,) if self._tuple_out else out


NoteRule = Callable[[int, MaskRule], None]


def check(layer: nn.Module, compiled: CompiledLayer, pattern: CallPattern) -> None:
    """Raise UncompilableError unless both give the same numbers, for one row and for many.

    The step and the experts behind both must be such that their outputs depend on everything they are given.
    """
    dtype = next(p.dtype for p in layer.parameters() if not p.is_meta)
    for rows, tries in _TRIES.items():
        errors = torch.cat([_errors(layer, compiled, pattern, rows) for _ in range(tries)])
        alike = (errors <= _TOLERANCE[dtype]).float().mean().item()
        if not alike >= _ALIKE:
            raise UncompilableError(f"only {alike:.0%} of its rows agree with their compiled form, {rows} at a time")


def _errors(layer: nn.Module, compiled: CompiledLayer, pattern: CallPattern, rows: int) -> torch.Tensor:
    """How far each of `rows` random rows is off, by its largest number."""
    leaves = list(pattern.leaves)
    for place, growing in zip(pattern.tensors, pattern.growing, strict=True):
        leaves[place] = _grown(leaves[place], growing, rows)
    args, kwargs = pytree.tree_unflatten(leaves, pattern.spec)
    outs = (layer(*args, **kwargs), compiled(*args, **kwargs))
    expected, got = (_rows(out[0] if pattern.tuple_out else out).float() for out in outs)
    return (got - expected).abs().amax(-1) / expected.abs().amax(-1).clamp(min=1e-6)


def _rows(out: torch.Tensor) -> torch.Tensor:
    return out.reshape(-1, out.shape[-1])
