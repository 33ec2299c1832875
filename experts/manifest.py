"""manifest.json: what an expert store holds, and the checksums that prove it."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.checkpoint import read_json
from experts.errors import StoreError

VERSION = 1
NAME = "manifest.json"
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NOISE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "auto_map")


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and checksum (hex) of a file of the store."""

    size: int
    sha256: str


@dataclass(frozen=True)
class SliceForm:
    """The arithmetic of one slice: `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` if it is not `gated`.

    `transposed`: weights are `[in, out]` instead of `[out, in]`. `activation`: its name where plain torch suffices,
    None where the family's own module must be asked (interleaved or clamped gates, a norm after the expert).
    """

    gated: bool
    bias: bool
    transposed: bool
    normed: bool
    activation: str | None


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    `expert_params` are shapes without an expert dimension, `hidden_size` is the width of the rows an expert takes and
    returns, `tied` tells whether tied weights are stored once, `source` names the copy of the checkpoint that was
    converted, `fingerprint` names the content: equal for equal configurations and tensors, wherever they came from.
    """

    version: int
    family: str
    architecture: str
    fingerprint: str
    source: str
    dtype: str
    num_experts: int
    moe_layers: tuple[int, ...]
    hidden_size: int
    top_k: int
    tied: bool
    form: SliceForm
    expert_params: Mapping[str, tuple[int, ...]]
    files: Mapping[str, FileEntry]

    @property
    def slice_numbers(self) -> int:
        """Weights of one slice."""
        return sum(math.prod(shape) for shape in self.expert_params.values())

    @property
    def slice_bytes(self) -> int:
        """Bytes of one slice's weights."""
        return self.slice_numbers * _ITEM_BYTES[self.dtype]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of the store in `folder`.

        Raises:
            StoreError: there is none, it was written by another version, or it is damaged.
        """
        remedy = "delete the store and run `evermoe prepare` again"
        content = read_json(folder / NAME, remedy)
        if content.get("version") != VERSION:
            raise StoreError(
                f"{folder / NAME} has version {content.get('version')!r}, this evermoe reads version {VERSION}; "
                "prepare the store again with this version"
            )
        checksum = content.pop("checksum", None)
        if checksum != _digest(content):
            raise StoreError(f"{folder / NAME} is damaged (its checksum does not match); {remedy}")
        return _decode(content)

    def write(self, folder: Path) -> None:
        """Put the manifest into `folder`, whole or not at all, and on disk when this returns."""
        content = dataclasses.asdict(self)
        content["checksum"] = _digest(content)
        write_whole(folder / NAME, json.dumps(content, indent=1).encode())


def fingerprint(config: Mapping[str, Any], files: Mapping[str, FileEntry]) -> str:
    """Hex digest of a model: its configuration and the checksums of its tensor files.

    What a configuration says about its own origin does not count, nor its dtype: the tensors show that.
    """
    model = {key: value for key, value in config.items() if key not in _NOISE}
    tensors = {name: entry.sha256 for name, entry in files.items() if name.endswith(".safetensors")}
    return _digest({"layout": VERSION, "config": model, "tensors": tensors})


def write_whole(file: Path, content: bytes) -> None:
    """Replace `file` so that nobody ever sees a part of `content`, also after a power failure."""
    aside = file.with_name(file.name + ".new")
    with aside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _decode(content: dict[str, Any]) -> Manifest:
    return Manifest(
        **{
            **content,
            "moe_layers": tuple(content["moe_layers"]),
            "form": SliceForm(**content["form"]),
            "expert_params": {name: tuple(shape) for name, shape in content["expert_params"].items()},
            "files": {name: FileEntry(**entry) for name, entry in content["files"].items()},
        }
    )
