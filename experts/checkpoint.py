"""A Hugging Face checkpoint folder as a name -> tensor table, read lazily and without keeping its pages mapped."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from experts.errors import StoreError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SERVED = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST_HEADER = 100 << 20  # what the safetensors library itself accepts
_KEEP_MAPPED = 256 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Where a checkpoint tensor lies and what it is."""

    shard: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A readable checkpoint: `tensors` by name over all shards, `config` as in config.json.

    `digest` names this copy of the checkpoint cheaply (configuration, file names, sizes, times and headers; the
    weights are not read): it changes whenever a file is replaced.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    digest: str

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Read the configuration and every shard's header.

        Raises:
            StoreError: the folder, its configuration or one of its weight files is missing or broken.
        """
        if not path.is_dir():
            raise StoreError(_not_a_folder(path))
        config = read_json(path / "config.json", "give a Hugging Face checkpoint folder, complete with its config.json")
        digest = hashlib.sha256((path / "config.json").read_bytes())
        tensors: dict[str, TensorInfo] = {}
        for shard, expected in _shards(path).items():
            header = _shard_header(path / shard)
            tensors |= {name: _tensor_info(path / shard, name, entry) for name, entry in header.items()}
            if missing := sorted(expected - header.keys()):
                raise StoreError(
                    f"{path / INDEX} places tensor {missing[0]} in {shard}, which has no such tensor; "
                    "download the checkpoint again"
                )
            status = (path / shard).stat()
            stamp = [shard, status.st_size, status.st_mtime_ns, header]
            digest.update(json.dumps(stamp, sort_keys=True).encode())
        return cls(path, config, tensors, digest.hexdigest())

    def serving_dtype(self, wish: str) -> torch.dtype:
        """The dtype to serve in: `wish`, or for "auto" the configuration's, or else that of the weights.

        Raises:
            StoreError: that is not one of float32, bfloat16 and float16.
        """
        known = {str(dtype).removeprefix("torch."): dtype for dtype in SERVED}
        if wish != "auto":
            if wish not in known:
                raise StoreError(f"dtype '{wish}' is not supported; choose auto, {', '.join(known)}")
            return known[wish]
        named = self.config.get("dtype") or self.config.get("torch_dtype")
        if named is None:
            floats = [info.dtype for info in self.tensors.values() if info.dtype.is_floating_point]
            named = str(floats[0]) if floats else "float32"
        if str(named).removeprefix("torch.") not in known:
            raise StoreError(f"{self.path} has dtype {named}, which is not served; ask for {', '.join(known)} instead")
        return known[str(named).removeprefix("torch.")]

    @contextmanager
    def reader(self) -> Iterator["Reader"]:
        """A `Reader`; tensors taken from it stay valid after it is closed."""
        reader = Reader(self)
        try:
            yield reader
        finally:
            reader.release()


class Reader:
    """Gives tensors as views of memory-mapped shards and unmaps those now and then.

    Pages of a file that only one process maps count as its private memory although the kernel can drop them at will;
    letting go of the maps after every `_KEEP_MAPPED` bytes keeps that number small as well.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._open: dict[str, Any] = {}
        self._taken = 0

    def tensor(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Tensor `name`, or only the `rows` of its first dimension."""
        info = self._checkpoint.tensors[name]
        file = self._checkpoint.path / info.shard
        try:
            if info.shard not in self._open:
                self._open[info.shard] = safe_open(file, framework="pt")
            shard = self._open[info.shard]
            tensor: torch.Tensor = shard.get_tensor(name) if rows is None else shard.get_slice(name)[rows]
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{file} cannot be read ({error}); download the checkpoint again") from error
        self._taken += tensor.nbytes
        return tensor

    def tidy(self) -> None:
        """Unmap the shards if much was read since the last time; call when no tensor of this reader is in use."""
        if self._taken > _KEEP_MAPPED:
            self.release()

    def release(self) -> None:
        """Unmap the shards, once the last tensor taken from them is gone."""
        self._open.clear()
        self._taken = 0


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        StoreError: the file is missing (ending in `remedy`), unreadable, or holds anything else.
    """
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{file} does not exist; {remedy}") from None
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise StoreError(f"{file} is not valid JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise StoreError(f"{file} does not hold a JSON object; {remedy}")
    return content


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Byte at which the data of a safetensors file begin, and its header's entries by tensor name.

    Raises:
        ValueError: not a safetensors file, or shorter or longer than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise ValueError("no safetensors header")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("no safetensors header")
    header.pop("__metadata__", None)
    end = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    if end != size:
        raise ValueError(f"it has {size} bytes and should have {end}")
    return 8 + length, header


def _not_a_folder(path: Path) -> str:
    if path.exists():
        return f"{path} is a file; give the checkpoint's folder"
    return f"checkpoint folder {path} does not exist; download the model first and give its folder"


def _shards(path: Path) -> dict[str, frozenset[str]]:
    """Weight files of a checkpoint with the tensors its index expects in each (none where there is no index)."""
    if (path / SINGLE).exists():
        return {SINGLE: frozenset()}
    if (path / INDEX).exists():
        return _indexed_shards(path)
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise StoreError(
            f"{path} holds only pickled weights, which are never loaded (they can run code); "
            "save the model as safetensors with transformers' save_pretrained"
        )
    raise StoreError(f"{path} has neither {SINGLE} nor {INDEX}; download the checkpoint again")


def _indexed_shards(path: Path) -> dict[str, frozenset[str]]:
    places = read_json(path / INDEX, "download the checkpoint again").get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise StoreError(f"{path / INDEX} has no weight_map; download the checkpoint again")
    shards: dict[str, set[str]] = {}
    for name, shard in places.items():
        shards.setdefault(shard, set()).add(name)
    for shard in shards:
        if Path(shard).name != shard:
            raise StoreError(f"{path / INDEX} names {shard!r}, which is not a file of this folder")
        if not (path / shard).exists():
            raise StoreError(f"{path / shard} is missing, {INDEX} names it; download the checkpoint again")
    return {shard: frozenset(names) for shard, names in sorted(shards.items())}


def _shard_header(file: Path) -> dict[str, Any]:
    try:
        return read_header(file)[1]
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        with file.open("rb") as stream:
            pointer = stream.read(32).startswith(b"version https://git-lfs")
        if pointer:
            raise StoreError(f"{file} is a git-lfs pointer, not the weights; run `git lfs pull` there") from error
        raise StoreError(f"{file} is truncated or damaged ({error}); download it again") from error


def _tensor_info(file: Path, name: str, entry: dict[str, Any]) -> TensorInfo:
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise StoreError(
            f"{file}: tensor {name} has dtype {entry['dtype']}, so the checkpoint is quantised; "
            "save a dequantised copy with transformers and use that"
        )
    return TensorInfo(file.name, dtype, tuple(entry["shape"]))
