"""The expert store: a checkpoint rewritten so that every process maps exactly the weights it serves.

    manifest.json              what is here, with checksums
    config.json, tokenizer...  as in the checkpoint
    gateway.safetensors        everything but experts, under the model's own names; tied weights once
    experts/<e>.safetensors    all layers of expert e, tensors named `<layer>.<parameter>`

Opening a store and mapping experts needs torch only; the modeling code is imported when a configuration is asked for,
or a checkpoint is converted.
"""

import functools
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from experts import manifest
from experts.checkpoint import DTYPES, Checkpoint, read_header, read_json
from experts.errors import StoreError
from experts.manifest import FileEntry, Manifest
from experts.mapped import MappedRange

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["ExpertStore", "FileEntry", "Manifest", "StoreError", "prepare"]

Progress = Callable[[int, int, str], None]
_PIECE = 8 << 20


@dataclass(frozen=True)
class ExpertStore:
    """A complete store.

    The tensors it gives are views of memory-mapped files: read-only by agreement, shared by all processes of a host,
    and unmapped when the last of them is dropped.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> "ExpertStore":
        """Check the store's structure and file sizes, and with `verify` every byte.

        Raises:
            StoreError: not a store, not a complete one, or damaged; the message names the file.
        """
        path = Path(os.path.abspath(path))
        _require_store(path)
        held = Manifest.read(path)
        for name, entry in held.files.items():
            _check_file(path / name, entry, verify)
        return cls(path, held)

    def config(self) -> "PretrainedConfig":
        """The model's configuration, with the dtype of this store.

        Raises:
            StoreError: the installed transformers does not accept it.
        """
        from experts import families

        raw = read_json(self.path / "config.json", "delete the store and run `evermoe prepare` again")
        config = families.read_config(self.path, raw)
        config.dtype = getattr(torch, self.manifest.dtype)
        if not self.manifest.tied:
            config.tie_word_embeddings = False
        return config

    def gateway_weights(self) -> dict[str, torch.Tensor]:
        """Every tensor outside the experts, by its name in the transformers model."""
        return self._tensors("gateway.safetensors")

    @property
    def slices(self) -> list[tuple[int, int]]:
        """All slices: (layer, expert)."""
        return [(layer, expert) for expert in range(self.manifest.num_experts) for layer in self.manifest.moe_layers]

    def slice(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Parameters of one expert in one layer by name, without an expert dimension; mapped for themselves.

        Raises:
            StoreError: there is no such expert, or its file is damaged.
            LookupError: `layer` has no experts.
        """
        if not 0 <= expert < self.manifest.num_experts:
            raise StoreError(f"{self.path} has experts 0 to {self.manifest.num_experts - 1}, not {expert}")
        file = self.path / f"experts/{expert}.safetensors"
        try:
            places = _places(file, file.stat().st_mtime_ns).get(layer)
            if places is None:
                raise LookupError(f"layer {layer} of {self.path} has no experts")
            ends = [place.begin + place.nbytes for place in places.values()]
            mapped = MappedRange(file, min(place.begin for place in places.values()), max(ends))
            return {name: mapped.tensor(at.dtype, at.shape, at.begin) for name, at in places.items()}
        except (OSError, ValueError) as error:
            raise _damaged(file, str(error)) from error

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        try:
            with safe_open(self.path / name, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            raise _damaged(self.path / name, str(error)) from error


class _Place(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@functools.lru_cache(maxsize=1024)
def _places(file: Path, written_ns: int) -> dict[int, dict[str, _Place]]:
    """Layer -> parameter -> its place in an expert's `file`, as of `written_ns`; raise ValueError for a bad header."""
    start, header = read_header(file)
    layers: dict[int, dict[str, _Place]] = {}
    try:
        for name, entry in header.items():
            layer, _, param = name.partition(".")
            begin = start + int(entry["data_offsets"][0])
            place = _Place(DTYPES[entry["dtype"]], tuple(entry["shape"]), begin)
            if place.nbytes != entry["data_offsets"][1] - entry["data_offsets"][0] or begin < start:
                raise ValueError(f"tensor {name} has another size than its shape says")
            layers.setdefault(int(layer), {})[param] = place
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"its header is not one of safetensors ({error!r})") from error
    return layers


def prepare(checkpoint: Path, store: Path, *, dtype: str = "auto", progress: Progress | None = None) -> ExpertStore:
    """Convert the Hugging Face checkpoint folder `checkpoint` into the folder `store`, or open it if that was done.

    Holds one expert's weights of one layer in memory at a time. `store` appears only when it is complete; until then
    the work lies in `<store>.partial`, where a run that was cut off is continued. Processes that prepare the same
    store at once wait for each other. `dtype` is float32, bfloat16, float16, or auto: what the checkpoint says.
    `progress(done_bytes, total_bytes, what)` is called after every tensor.

    Raises:
        StoreError: the checkpoint is broken or its family cannot be served, `store` holds something else, or the disk
            is full.
    """
    from experts import preparation

    report = progress or (lambda done, total, what: None)
    checkpoint, store = Path(os.path.abspath(checkpoint)), Path(os.path.abspath(store))
    if (checkpoint / manifest.NAME).exists():
        raise StoreError(f"{checkpoint} is an expert store already; serve it as it is")
    source = Checkpoint.open(checkpoint)
    kept = source.serving_dtype(dtype)
    partial = store.with_name(store.name + ".partial")
    try:
        while not _occupied(store):
            with preparation.locked(partial, report) as owned:
                if owned and not _occupied(store):
                    preparation.fill(partial, source, kept, report).write(partial)
                    preparation.publish(partial, store)
    except OSError as error:
        raise StoreError(
            f"cannot write the store to {partial}: {error.strerror or error}; what is finished there is kept, "
            "run `evermoe prepare` again once that is solved"
        ) from error
    return _reuse(store, source, kept)


def _reuse(store: Path, source: Checkpoint, dtype: torch.dtype) -> ExpertStore:
    """The store that is there, if it is made of `source`."""
    opened = ExpertStore.open(store)
    if opened.manifest.source != source.digest or getattr(torch, opened.manifest.dtype) != dtype:
        raise StoreError(
            f"{store} was prepared from another checkpoint, an older version of it or for another dtype; "
            "delete it or choose another folder"
        )
    return opened


def _occupied(store: Path) -> bool:
    """Whether something is at `store` already; an empty folder does not count."""
    if store.is_dir():
        return any(store.iterdir())
    return store.exists()


def _require_store(path: Path) -> None:
    if (path / manifest.NAME).is_file():
        if path.name.endswith(".partial"):
            raise StoreError(f"{path} is a store whose preparation was cut off; run `evermoe prepare` again")
        return
    if path.with_name(path.name + ".partial").is_dir() and not path.exists():
        raise StoreError(f"{path} is not complete, its preparation was cut off; run `evermoe prepare` again")
    if not path.exists():
        raise StoreError(f"expert store {path} does not exist; make it with `evermoe prepare MODEL {path}`")
    if (path / "config.json").is_file():
        raise StoreError(f"{path} is a checkpoint, not an expert store; convert it with `evermoe prepare {path} STORE`")
    raise StoreError(f"{path} is not an expert store: it has no {manifest.NAME}; make one with `evermoe prepare`")


def _check_file(file: Path, entry: FileEntry, verify: bool) -> None:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise _damaged(file, error.strerror or str(error)) from error
    if size != entry.size:
        raise _damaged(file, f"it has {size} bytes and should have {entry.size}")
    if verify and _sha256(file) != entry.sha256:
        raise _damaged(file, "its checksum does not match")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _damaged(file: Path, how: str) -> StoreError:
    return StoreError(f"{file} is damaged ({how}); delete the store and run `evermoe prepare` again")
