"""Compiling a model's decoder layers beside the gateway that serves it, and taking them over when they are there.

python -m gateway.compilation STORE FOLDER      compiles what FOLDER does not have yet
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from experts.store import ExpertStore
from gateway import layer_ops, paged_decode
from gateway.compiled_layers import CallPattern, CompiledLayer, UncompilableError, check, package, patterns, signature
from gateway.masks import MaskRule
from gateway.model import GatewayModel, load_model

log = logging.getLogger(__name__)

_LOWEST_PRIORITY = 19
_TERMINATED_WITH_PARENT = 1  # PR_SET_PDEATHSIG


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
        """See `gateway.model.ExpertsFunction`."""
        return (hidden.float() * (weights.float() * (index + 1)).sum(-1, keepdim=True)).to(hidden.dtype)


def adopt(model: GatewayModel, folder: Path) -> int:
    """Let `model` run what `folder` has of its layers from now on; how many they are. Between two steps only."""
    paged_decode.load(folder)
    adopted = 0
    for index, (pattern, file) in enumerate(_packages(model, folder)):
        if not file.exists():
            continue
        layer = model.layers[index]
        try:
            with torch.inference_mode():
                compiled = CompiledLayer(layer, index, pattern, file, model.calls.note_rule)
                _check(model, index, compiled, pattern)
        except (UncompilableError, RuntimeError) as error:
            log.warning("layer %d runs as it is, not compiled: %s", index, error)
            continue
        layer.forward = compiled
        adopted += 1
    model.compiled = adopted
    return adopted


def _packages(model: GatewayModel, folder: Path) -> list[tuple[CallPattern, Path]]:
    """For each layer how it is called, and the folder of its compiled form."""
    called = patterns(model.layers, lambda rows: model.rehearse(rows, Echo(), Echo.experts))
    return [(pattern, folder / signature(layer, pattern)) for layer, pattern in zip(model.layers, called, strict=True)]


def _check(model: GatewayModel, index: int, compiled: CompiledLayer, pattern: CallPattern) -> None:
    calls = model.calls
    calls.step, (calls.answer, served) = Echo(), (Echo.experts, calls.answer)
    try:
        with layer_ops.answering(calls):
            check(model.layers[index], compiled, pattern)
    finally:
        calls.answer = served


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
        with self._lock:
            if self._closed:
                return
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(self._folder / "build")}, start_new_session=True,
            )  # fmt: skip
        _, said = self._process.communicate()
        if self._process.returncode and not self._closed:
            reason = said.decode(errors="replace").strip().splitlines()
            log.warning("decoder layers are not compiled: %s", reason[-1] if reason else "the compiler was killed")
        if not self._closed:
            self._done()


def main() -> None:
    """Compile, for each kind of layer, what the folder does not have yet."""
    store, folder = Path(sys.argv[1]), Path(sys.argv[2])
    os.nice(_LOWEST_PRIORITY)
    ctypes.CDLL(None).prctl(_TERMINATED_WITH_PARENT, signal.SIGKILL)
    torch.set_num_threads(1)
    model = load_model(ExpertStore.open(store), experts=Echo.experts)
    folder.mkdir(parents=True, exist_ok=True)
    paged_decode.build(folder)
    for layer, (pattern, file) in zip(model.layers, _packages(model, folder), strict=True):
        if not file.exists():
            package(layer, pattern, file)


if __name__ == "__main__":
    main()
