"""Filling a store folder from a checkpoint: streaming, and able to continue after being cut off.

The work is a row of steps, about one per layer. Every file is written front to back; after a step its length in
tensors and its checksum so far are recorded. A later run trusts a record only if the source is still the same and the
bytes on disk have those checksums, so nothing needs to be flushed to disk before the very end.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig
from transformers.core_model_loading import dot_natural_key

from experts import families
from experts.checkpoint import Checkpoint, Reader
from experts.errors import StoreError
from experts.manifest import VERSION, FileEntry, Manifest, SliceForm, fingerprint
from experts.model_tensors import ModelTensors
from experts.safetensors_writer import SafetensorsWriter, TensorSpec, encode_header

Progress = Callable[[int, int, str], None]
_Ordered = tuple[int, list[tuple[int | str, ...]], str]  # a name behind its place in a file

GATEWAY = "gateway.safetensors"
LOCK = "lock"
_RECORD = "progress.json"
_COPIED = ("config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json")
_COPIED_PATTERNS = ("tokenizer*", "vocab.*", "merges.txt", "chat_template*", "*.model", "*.tiktoken")


@contextlib.contextmanager
def locked(folder: Path, progress: Progress) -> Iterator[bool]:
    """Make `folder` and hold its lock; gives False if the folder was finished or removed while waiting for it.

    A folder that is still empty at the end is removed: a refused checkpoint leaves nothing behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context((folder / LOCK).open("ab"))
        except FileNotFoundError:  # its owner finished it between the two lines above
            yield False
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(0, 0, "waiting for another process that prepares this store")
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            current = os.path.samestat(os.fstat(lock.fileno()), (folder / LOCK).stat())
        except FileNotFoundError:
            current = False
        try:
            yield current
        finally:
            if current and folder.is_dir() and [entry.name for entry in folder.iterdir()] == [LOCK]:
                shutil.rmtree(folder)


def fill(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, progress: Progress) -> Manifest:
    """Write everything of a store but the manifest into `folder`, whose lock is held; returns the manifest.

    Raises:
        StoreError: the checkpoint cannot be served, or the disk is full.
    """
    config = families.read_config(checkpoint.path, checkpoint.config)
    families.refuse_unsupported(config)
    model = families.meta_model(config, dtype)
    tensors = ModelTensors(model, checkpoint)
    top_k = families.experts_per_token(config)
    work = _Work(folder, checkpoint, tensors, dtype, progress)
    work.run()
    files = {name: FileEntry(writer.size, writer.sha256) for name, writer in work.writers.items()}
    files |= _copy_small_files(checkpoint.path, folder)
    for name in files:
        _sync(folder / name)
    _sync(folder / "experts")
    return _manifest(config, type(model).__name__, checkpoint, tensors, files, dtype, top_k)


def publish(folder: Path, store: Path) -> None:
    """Make the finished `folder`, whose lock is held, the store; nobody sees `store` before it is complete."""
    (folder / _RECORD).unlink()
    (folder / LOCK).unlink()
    _sync(folder)
    folder.rename(store)
    _sync(store.parent)


@dataclass(frozen=True)
class _Step:
    """What is recorded together: some of the gateway's tensors and the experts of one layer, or of none."""

    label: str
    gateway: tuple[str, ...]
    experts: int | None = None


class _Work:
    """The steps of one conversion and the files they write."""

    def __init__(
        self, folder: Path, checkpoint: Checkpoint, tensors: ModelTensors, dtype: torch.dtype, progress: Progress
    ) -> None:
        self._folder = folder
        self._checkpoint = checkpoint
        self._tensors = tensors
        self._progress = progress
        self._steps = _steps(tensors, dtype)
        self._specs = _layout(tensors, self._steps)
        self.writers = {name: SafetensorsWriter(folder / name, specs) for name, specs in self._specs.items()}
        self._total = sum(writer.total for writer in self.writers.values())

    def run(self) -> None:
        """Do the steps that are not done yet."""
        first = self._resume()
        self._check_space()
        if first == 0:
            self._start()
        for number, step in enumerate(self._steps[first:], first + 1):
            with self._checkpoint.reader() as reader:
                self._do(step, reader)
            self._record(number)

    def _do(self, step: _Step, reader: Reader) -> None:
        for name, tensor in self._tensors.read_gateway(step.gateway, reader):
            self.writers[GATEWAY].append(name, tensor)
            self._report(step.label)
        if step.experts is not None:
            for expert, param, tensor in self._tensors.read_experts(step.experts, reader):
                self.writers[expert_file(expert)].append(f"{step.experts}.{param}", tensor)
                self._report(step.label)

    def _report(self, label: str) -> None:
        self._progress(sum(writer.size for writer in self.writers.values()), self._total, label)

    def _start(self) -> None:
        for entry in self._folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != LOCK:
                entry.unlink()
        for writer in self.writers.values():
            writer.start()

    def _resume(self) -> int:
        """Take up an earlier run's record; returns how many steps need not be done again."""
        try:
            record = json.loads((self._folder / _RECORD).read_bytes())
            if record["of"] != self._identity():
                return 0
            self._report("checking what an earlier run has written")
            good = [writer.resume(*record["files"][name]) for name, writer in self.writers.items()]
            return int(record["step"]) if all(good) else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _record(self, step: int) -> None:
        files = {name: (writer.count, writer.sha256) for name, writer in self.writers.items()}
        content = {"of": self._identity(), "step": step, "files": files}
        aside = self._folder / (_RECORD + ".new")
        aside.write_text(json.dumps(content))
        aside.replace(self._folder / _RECORD)

    def _identity(self) -> str:
        """Changes with the source and with everything that decides what the files look like."""
        digest = hashlib.sha256(f"{VERSION} {self._checkpoint.digest}".encode())
        for name, specs in sorted(self._specs.items()):
            digest.update(name.encode() + encode_header(specs))
        return digest.hexdigest()

    def _check_space(self) -> None:
        sizes = [file.stat().st_size for file in self._folder.rglob("*.safetensors")]
        need, free = self._total - sum(sizes), shutil.disk_usage(self._folder).free
        if need > free:
            raise StoreError(
                f"{self._folder.parent} has {free / 1e9:.1f} GB free and the store needs {need / 1e9:.1f} GB; "
                "free some space or choose another place"
            )


def expert_file(expert: int) -> str:
    """Name of an expert's file within a store."""
    return f"experts/{expert}.safetensors"


def _steps(tensors: ModelTensors, dtype: torch.dtype) -> list[_Step]:
    """The order of work. Within a file wider dtypes come first, so that every tensor is aligned."""
    outside: list[str] = []
    wide: list[_Ordered] = []
    narrow: list[_Ordered] = []
    layers: dict[int, list[str]] = {layer: [] for layer in tensors.modules}
    for name, (kept, _) in tensors.gateway_tensors().items():
        layer = families.layer_of(name)
        if kept.itemsize != dtype.itemsize:
            (wide if kept.itemsize > dtype.itemsize else narrow).append((-kept.itemsize, dot_natural_key(name), name))
        elif layer is None:
            outside.append(name)
        else:
            layers.setdefault(layer, []).append(name)
    first = [name for _, _, name in sorted(wide)] + sorted(outside, key=dot_natural_key)
    steps = [_Step("embeddings and head", tuple(first))]
    for layer, names in sorted(layers.items()):
        experts = layer if layer in tensors.modules else None
        steps.append(_Step(f"layer {layer}", tuple(sorted(names, key=dot_natural_key)), experts))
    return [*steps, _Step("small tensors", tuple(name for _, _, name in sorted(narrow)))]


def _layout(tensors: ModelTensors, steps: list[_Step]) -> dict[str, list[TensorSpec]]:
    """What each file holds, in the order in which the steps write it."""
    gateway = tensors.gateway_tensors()
    files = {GATEWAY: [TensorSpec(name, *gateway[name]) for step in steps for name in step.gateway]}
    count = families.count_experts(next(iter(tensors.modules.values())))
    params = [
        TensorSpec(f"{layer}.{param}", dtype, shape)
        for layer in tensors.modules
        for param, (dtype, shape) in tensors.expert_tensors(layer).items()
    ]
    return files | {expert_file(expert): params for expert in range(count)}


def _manifest(
    config: PretrainedConfig,
    architecture: str,
    checkpoint: Checkpoint,
    tensors: ModelTensors,
    files: dict[str, FileEntry],
    dtype: torch.dtype,
    top_k: int,
) -> Manifest:
    module = next(iter(tensors.modules.values()))
    form = SliceForm(
        gated=bool(module.has_gate),
        bias=bool(module.has_bias),
        transposed=bool(module.is_transposed),
        normed=bool(module.has_post_expert_norm),
        activation=families.plain_activation(module),
    )
    shapes = families.expert_shapes(module)
    return Manifest(
        version=VERSION,
        family=config.model_type,
        architecture=architecture,
        fingerprint=fingerprint(checkpoint.config, files),
        source=checkpoint.digest,
        dtype=str(dtype).removeprefix("torch."),
        num_experts=families.count_experts(module),
        moe_layers=tuple(tensors.modules),
        hidden_size=shapes["down_proj"][1 if form.transposed else 0],
        top_k=top_k,
        tied=bool(getattr(config, "tie_word_embeddings", False)) and not tensors.untied,
        form=form,
        expert_params=shapes,
        files=files,
    )


def _copy_small_files(source: Path, folder: Path) -> dict[str, FileEntry]:
    """Copy configuration and tokenizer; returns their sizes and checksums."""
    found = {source / name for name in _COPIED} | {file for each in _COPIED_PATTERNS for file in source.glob(each)}
    copied = {}
    for file in sorted(found):
        if file.is_file():
            content = file.read_bytes()
            (folder / file.name).write_bytes(content)
            copied[file.name] = FileEntry(len(content), hashlib.sha256(content).hexdigest())
    return copied


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
