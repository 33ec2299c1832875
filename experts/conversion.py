"""How tensors of a checkpoint become tensors of a transformers model.

transformers describes that per family, as renamings and converters (`transformers.conversion_mapping`), and applies
them to whole layers while it loads. Here the same descriptions are applied to one group of tensors at a time, or to
one expert's share of a group, so that a conversion needs memory for a single expert's weights.
"""

import copy
import enum
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from experts.checkpoint import Checkpoint
from experts.errors import StoreError

log = logging.getLogger(__name__)
Read = Callable[[str, slice | None], torch.Tensor]


@dataclass
class Group:
    """Checkpoint tensors that become model tensor `target`, or several of which it is the first.

    `sources` holds the checkpoint names per source pattern of `converter`, or a single name where none is needed.
    """

    target: str
    converter: Any = None
    sources: dict[str, list[str]] = field(default_factory=dict)

    def names(self) -> Iterator[str]:
        """Every checkpoint tensor of the group."""
        for names in self.sources.values():
            yield from names

    def convert(self, model: PreTrainedModel, read: Read, rows: slice | None = None) -> dict[str, torch.Tensor]:
        """The model tensors made of this group, by name; `rows` of each source tensor are read."""
        if self.converter is None:
            return {self.target: read(next(self.names()), rows)}
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, read(name, rows))
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}

    def shapes(
        self, model: PreTrainedModel, checkpoint: Checkpoint, rows: slice | None = None
    ) -> dict[str, torch.Size]:
        """Shapes of what `convert` would make, found without reading anything.

        Raises:
            StoreError: the tensors cannot be converted together.
        """

        def read(name: str, rows: slice | None) -> torch.Tensor:
            info = checkpoint.tensors[name]
            tensor = torch.empty(info.shape, dtype=info.dtype, device="meta")
            return tensor if rows is None else tensor[rows]

        try:
            return {name: tensor.shape for name, tensor in self.convert(model, read, rows).items()}
        except Exception as error:
            raise StoreError(
                f"{checkpoint.path}: the tensors for {self.target} do not fit together ({error}); "
                "the checkpoint is incomplete or not of this family"
            ) from error


class Grain(enum.Enum):
    """How the checkpoint stores a parameter of all experts of a layer."""

    STACKED = enum.auto()  # a tensor per expert, stacked while loading
    FUSED = enum.auto()  # one tensor with a leading expert dimension
    WHOLE = enum.auto()  # in a way in which experts cannot be told apart before the conversion


@dataclass(frozen=True)
class ExpertGroup:
    """A group that becomes one parameter of all `experts` experts of a layer."""

    group: Group
    experts: int
    grain: Grain

    @classmethod
    def of(cls, group: Group, experts: int, checkpoint: Checkpoint) -> "ExpertGroup":
        """Find out how the checkpoint stores `group`."""
        operations = list(group.converter.operations) if group.converter is not None else []
        infos = [[checkpoint.tensors[name] for name in names] for names in group.sources.values()]
        uniform = all(len({info.shape for info in same}) == 1 for same in infos)
        if operations and isinstance(operations[0], MergeModulelist) and operations[0].dim == 0:
            stacked = uniform and all(len(same) == experts for same in infos)
            grain = Grain.STACKED if stacked and all(map(_keeps_experts_apart, operations[1:])) else Grain.WHOLE
        else:
            fused = all(len(same) == 1 and same[0].shape[:1] == (experts,) for same in infos)
            grain = Grain.FUSED if fused and all(map(_keeps_experts_apart, operations)) else Grain.WHOLE
        return cls(group, experts, grain)

    def share(self, expert: int) -> tuple[Group, slice | None]:
        """What to convert, and which rows of it, to get `[1, ...]` for one expert; not for `Grain.WHOLE`."""
        if self.grain is Grain.FUSED:
            return self.group, slice(expert, expert + 1)
        sources = {pattern: [names[expert]] for pattern, names in self.group.sources.items()}
        return Group(self.group.target, self.group.converter, sources), None


def group_tensors(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Group]:
    """Every tensor of the checkpoint that `model` has a place for, by the first model tensor it leads to.

    Follows `transformers.core_model_loading.convert_and_load_state_dict_in_model`.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix, state = model.base_model_prefix, model.state_dict()
    groups: dict[str, Group] = {}
    unplaced: list[str] = []
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            unplaced.append(name)
            continue
        group = groups.setdefault(target, Group(target, by_pattern[pattern] if pattern else None))
        group.sources.setdefault(pattern or name, []).append(name)
    _report_unplaced(model, checkpoint, unplaced)
    return groups


def _report_unplaced(model: PreTrainedModel, checkpoint: Checkpoint, names: list[str]) -> None:
    expected = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    names = [name for name in names if not any(re.search(pattern, name) for pattern in expected)]
    if names:
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        log.warning("%s: %d tensors have no place in the model, left out: %s", checkpoint.path, len(names), listed)


def _keeps_experts_apart(operation: Any) -> bool:
    """Whether an operation on `[experts, ...]` tensors never mixes experts."""
    if isinstance(operation, Transpose):
        return min(operation.dim0, operation.dim1) > 0 and not operation.check_dims
    return isinstance(operation, Chunk | Concatenate | Interleave) and int(operation.dim) > 0
