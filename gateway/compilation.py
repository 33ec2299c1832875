"""Compiling a model's decoder layers beside the gateway that serves it, and taking them over when they are there.

python -m gateway.compilation STORE FOLDER      compiles what FOLDER does not have yet
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from experts import kernels, native_code
from experts.store import ExpertStore, StoreError
from gateway import layer_ops, paged_decode
from gateway.compiled_layers import CallPattern, CompiledLayer, UncompilableError, check, package, patterns, signature
from gateway.masks import MaskRule
from gateway.model import GatewayModel, ModelError, load_model

log = logging.getLogger(__name__)

_LOWEST_PRIORITY = 19
_TERMINATED_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_FOR_PEOPLE = (UncompilableError, StoreError, ModelError, native_code.NoCompilerError)
_ENVIRONMENT = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no pool of compilers beside it


class Echo:
    """Stands in for attention and experts; its outputs depend on everything it is given."""

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
        mixed = values.mean(0)[:, None] + query.mean(-1).t()[..., None] + keys.mean((0, 2))[:, None, None] * scaling
        return mixed if sinks is None else mixed + sinks.to(mixed.dtype)[None, :, None]

    @staticmethod
    def experts(layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `gateway.layer_calls.ExpertsFunction`."""
        return (hidden.float() * (weights.float() * (index + 1)).sum(-1, keepdim=True)).to(hidden.dtype)


def adopt(model: GatewayModel, folder: Path) -> bool:
    """Let `model` run what `folder` has of its layers from now on; whether that is all. Between two steps only."""
    complete = all([paged_decode.load(folder), kernels.load(folder)])
    refused = Refusals()
    adopted = 0
    for index, found in enumerate(_packages(model, folder)):
        if isinstance(found, UncompilableError):
            refused.add(index, found)
            continue
        pattern, file = found
        if not file.exists():
            complete = False
            continue
        try:
            with torch.inference_mode():
                compiled = CompiledLayer(model.layers[index], index, pattern, file, model.calls.note_rule)
                _check(model, index, compiled, pattern)
        except (UncompilableError, RuntimeError) as error:
            refused.add(index, error)
            continue
        model.layers[index].forward = compiled
        adopted += 1
    model.compiled = adopted
    if refused:
        log.warning("not all decoder layers run compiled: %s", refused)
    return complete


class Refusals:
    """Which layers are not compiled, and why."""

    def __init__(self) -> None:
        self._layers: dict[str, list[int]] = {}

    def __bool__(self) -> bool:
        return bool(self._layers)

    def __str__(self) -> str:
        return "; ".join(f"layers {', '.join(map(str, layers))}: {reason}" for reason, layers in self._layers.items())

    def add(self, layer: int, error: Exception) -> None:
        """Note that `layer` is not."""
        self._layers.setdefault(_one_line(error), []).append(layer)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else "it gave no reason"
    return (said if isinstance(error, _FOR_PEOPLE) else f"{type(error).__name__}: {said}")[:300]


def _packages(model: GatewayModel, folder: Path) -> list[tuple[CallPattern, Path] | UncompilableError]:
    """For each layer how it is called, and the folder of its compiled form; or why it has none."""
    called = patterns(model.layers, lambda rows: model.rehearse(rows, Echo(), Echo.experts))
    return [
        pattern if isinstance(pattern, UncompilableError) else (pattern, folder / signature(layer, pattern))
        for layer, pattern in zip(model.layers, called, strict=True)
    ]


def _check(model: GatewayModel, index: int, compiled: CompiledLayer, pattern: CallPattern) -> None:
    model.calls.step = Echo()
    with model.calls.answered_by(Echo.experts), layer_ops.answering(model.calls):
        check(model.layers[index], compiled, pattern)


class Compilation:
    """The process that compiles, at the lowest priority. Stopped with `close`."""

    def __init__(self, store: Path, folder: Path, done: Callable[[], None]) -> None:
        """`done` is called, in a thread of its own, when there is something to adopt."""
        self._done = done
        self._folder = folder
        self._command = [sys.executable, "-m", "gateway.compilation", str(store), str(folder)]
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="compilation", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End it, done or not."""
        with self._lock:
            self._closed = True
            if self._process is not None and self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        # Compilers are untidy, and killed ones most of all: theirs is a folder that goes with them.
        with tempfile.TemporaryDirectory(prefix="evermoe-compilation-", ignore_cleanup_errors=True) as scratch:
            self._compile(scratch)

    def _compile(self, scratch: str) -> None:
        with self._lock:
            if self._closed:
                return
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                start_new_session=True, env={**os.environ, **_ENVIRONMENT, "TMPDIR": scratch,
                                             "TORCHINDUCTOR_CACHE_DIR": scratch},
            )  # fmt: skip
        _, said = self._process.communicate()
        for half_done in self._folder.glob(f"*.{self._process.pid}"):
            shutil.rmtree(half_done, ignore_errors=True)
        if self._process.returncode and not self._closed:
            reason = said.decode(errors="replace").strip().splitlines()
            log.warning("decoder layers are not compiled: %s", reason[-1] if reason else "the compiler was killed")
        if not self._closed:
            self._done()


def compile_layers(store: Path, folder: Path) -> Refusals:
    """Compile, for each kind of layer, what the folder does not have yet; say which kinds can't be compiled.

    Raises StoreError or ModelError for a store that can't be served, RuntimeError where nothing can be compiled.
    """
    native_code.need_compiler()
    model = load_model(ExpertStore.open(store), experts=Echo.experts)
    folder.mkdir(parents=True, exist_ok=True)
    paged_decode.build(folder)
    kernels.build(folder)
    refused = Refusals()
    tried: dict[Path, Exception | None] = {}
    for index, found in enumerate(_packages(model, folder)):
        if isinstance(found, UncompilableError):
            refused.add(index, found)
            continue
        pattern, file = found
        if file not in tried:
            tried[file] = None if file.exists() else _package(model.layers[index], pattern, file)
        if (failure := tried[file]) is not None:
            refused.add(index, failure)
    return refused


def _package(layer: nn.Module, pattern: CallPattern, folder: Path) -> Exception | None:
    """What hindered it; exporting modeling code fails in more ways than torch has names for."""
    try:
        package(layer, pattern, folder)
    except Exception as error:
        return None if folder.exists() else error  # another process may have been faster
    return None


def main() -> None:
    """Compile at the lowest priority, as long as the parent lives; exit with one line where not all can be."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m gateway.compilation STORE FOLDER")
    os.nice(_LOWEST_PRIORITY)
    ctypes.CDLL(None).prctl(_TERMINATED_WITH_PARENT, signal.SIGKILL)
    torch.set_num_threads(1)
    try:
        refused = compile_layers(Path(sys.argv[1]), Path(sys.argv[2]))
    except (StoreError, ModelError, RuntimeError, OSError) as error:
        sys.exit(_one_line(error))
    if refused:
        sys.exit(str(refused))


if __name__ == "__main__":
    main()
