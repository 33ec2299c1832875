"""The tensors of a served model, cut in two: what the gateway holds, and what each expert holds.

Names, shapes and dtypes are known before anything is read: everything is first tried on the meta device, so that a
checkpoint that does not fit its configuration is refused at once.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from experts import families
from experts.checkpoint import Checkpoint, Reader
from experts.conversion import ExpertGroup, Grain, Group, group_tensors
from experts.errors import StoreError

log = logging.getLogger(__name__)


class ModelTensors:
    """Everything `checkpoint` holds for `model`, which is on the meta device in the dtype it is to be served in.

    `modules` are the experts modules by absolute layer index. `untied` is True if tensors that the configuration ties
    to each other differ, so that both are kept.

    Raises:
        StoreError: tensors are missing, or have other shapes than the configuration asks for.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._state = model.state_dict()
        self._dtype_kept = _dtypes_kept(model)
        self.modules = families.moe_modules(model)
        groups = group_tensors(model, checkpoint)
        self._experts = {layer: self._take_experts(groups, layer) for layer in self.modules}
        self._gateway = {name: group for group in groups.values() for name in self._check_gateway(group)}
        self.untied = self._settle_tied()
        self._check_complete()

    def gateway_tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor outside the experts, by the model's own name for it."""
        return {name: (self._dtype(name), tuple(self._state[name].shape)) for name in self._gateway}

    def expert_tensors(self, layer: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every parameter of one expert of `layer`."""
        shapes = families.expert_shapes(self.modules[layer])
        return {param: (self._dtype(self._experts[layer][param].group.target), shapes[param]) for param in shapes}

    def read_gateway(self, names: Iterable[str], reader: Reader) -> Iterator[tuple[str, torch.Tensor]]:
        """The gateway's tensors `names`, one at a time, in the checkpoint's dtype."""
        made: dict[str, torch.Tensor] = {}
        for name in names:
            if name not in made:
                made |= self._gateway[name].convert(self._model, reader.tensor)
            yield name, made.pop(name)
            if not made:
                reader.tidy()

    def read_experts(self, layer: int, reader: Reader) -> Iterator[tuple[int, str, torch.Tensor]]:
        """(expert, parameter, tensor) of every expert of `layer`, expert by expert, in the checkpoint's dtype."""
        module, groups = self.modules[layer], self._experts[layer]
        whole = {
            param: entry.group.convert(self._model, reader.tensor)[entry.group.target]
            for param, entry in groups.items()
            if entry.grain is Grain.WHOLE
        }
        for expert in range(families.count_experts(module)):
            for param, entry in groups.items():
                if param in whole:
                    yield expert, param, whole[param][expert] if families.is_batched(param) else whole[param]
                else:
                    group, rows = entry.share(expert)
                    yield expert, param, group.convert(self._model, reader.tensor, rows)[group.target][0]
            if not whole:
                reader.tidy()

    def _take_experts(self, groups: dict[str, Group], layer: int) -> dict[str, ExpertGroup]:
        """Move the groups of one layer's experts out of `groups`, by parameter name."""
        module = self.modules[layer]
        path = next(path for path, candidate in self._model.named_modules() if candidate is module)
        taken: dict[str, ExpertGroup] = {}
        for param in families.expert_shapes(module):
            target = f"{path}.{param}"
            if target not in groups:
                raise self._missing(target)
            entry = ExpertGroup.of(groups.pop(target), families.count_experts(module), self._checkpoint)
            shape = self._state[target].shape
            if entry.grain is Grain.WHOLE:
                self._check_shapes(entry.group.shapes(self._model, self._checkpoint), {target: shape})
            else:
                group, rows = entry.share(entry.experts - 1)
                self._check_shapes(group.shapes(self._model, self._checkpoint, rows), {target: (1, *shape[1:])})
            taken[param] = entry
        return taken

    def _check_gateway(self, group: Group) -> list[str]:
        """The model tensors made of `group`, after a look at their shapes."""
        made = group.shapes(self._model, self._checkpoint)
        names = [name for name in made if name in self._state]
        self._check_shapes(made, {name: self._state[name].shape for name in names})
        return names

    def _check_shapes(self, made: dict[str, torch.Size], expected: dict[str, tuple[int, ...]]) -> None:
        for name, shape in expected.items():
            if name not in made:
                raise self._missing(name)
            if made[name] != torch.Size(shape):
                raise StoreError(
                    f"{self._checkpoint.path}: {name} has shape {tuple(made[name])} in the weights but {tuple(shape)} "
                    "in config.json; they belong to different models or the checkpoint is incomplete"
                )

    def _settle_tied(self) -> bool:
        """Keep one tensor of each tied pair, under the name that the others are tied to; True if a pair differs."""
        untied, have = False, self._gateway
        for other, first in self._model.all_tied_weights_keys.items():
            if other in have and first not in have:
                have[first] = Group(first, None, {name: [name] for name in have.pop(other).names()})
            elif other in have and self._equal(first, other):
                del have[other]
            elif other in have:
                untied = True
                log.warning("%s: %s and %s differ although they are tied", self._checkpoint.path, other, first)
        return untied

    def _equal(self, one: str, other: str) -> bool:
        with self._checkpoint.reader() as reader:
            left, right = (self._gateway[name].convert(self._model, reader.tensor)[name] for name in (one, other))
            return torch.equal(left, right)

    def _check_complete(self) -> None:
        inside = {entry.group.target for groups in self._experts.values() for entry in groups.values()}
        tied = self._model.all_tied_weights_keys
        optional = self._model._keys_to_ignore_on_load_missing or ()
        for name in self._state:
            known = name in inside or name in self._gateway or tied.get(name) in self._gateway
            if not known and not any(re.search(pattern, name) for pattern in optional):
                raise self._missing(name)

    def _dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._dtype_kept(name) or self._state[name].dtype
        return dtype

    def _missing(self, name: str) -> StoreError:
        return StoreError(
            f"{self._checkpoint.path}: there is no tensor for {name}; the checkpoint is incomplete, download it again"
        )


def _dtypes_kept(model: PreTrainedModel) -> Callable[[str], torch.dtype | None]:
    """The dtype that a family keeps a tensor in, whatever the rest of the model has (None: like the rest)."""
    plan = model._get_dtype_plan(model.dtype)
    if not plan:
        return lambda name: None
    pattern, by_group, _ = build_glob_alternation(list(plan))

    def kept(name: str) -> torch.dtype | None:
        match = pattern.search(name)
        return plan[by_group[match.lastgroup]] if match else None

    return kept
