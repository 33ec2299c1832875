"""Our own C++ operators, compiled where they run: for one processor and one torch."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import tempfile
from pathlib import Path

import torch

log = logging.getLogger(__name__)


class NoCompilerError(RuntimeError):
    """This machine can't compile C++; the message says what to do."""


@functools.cache
def made_for() -> str:
    """Equal where the same compiled code runs: torch, the vectors it uses here, and the processor's instructions."""
    return f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()} {_instructions()}"


def need_compiler() -> None:
    """Raise NoCompilerError where there is no C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise NoCompilerError("there is no C++ compiler here; install g++, or name one in CXX") from None


def library(source: Path, folder: Path) -> Path:
    """The file in `folder` that `source` is compiled to: named by what it is made of and for."""
    headers = sorted(Path(__file__).parent.glob("*.h"))
    made_of = " ".join([made_for(), *(file.read_text() for file in [source, *headers])])
    return folder / f"{source.stem}-{hashlib.sha256(made_of.encode()).hexdigest()[:24]}.so"


def build(source: Path, folder: Path) -> None:
    """Compile `source` into `folder`, whole or not at all; raise RuntimeError where that can't be done."""
    from torch._inductor import cpp_builder, cpu_vec_isa

    need_compiler()
    target = library(source, folder)
    if target.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder, suffix=f".{os.getpid()}") as aside:
        builder = cpp_builder.CppBuilder(
            name=source.stem,
            sources=str(source),
            output_dir=aside,
            BuildOption=cpp_builder.CppTorchOptions(vec_isa=cpu_vec_isa.pick_vec_isa()),
        )
        builder.build()
        Path(builder.get_target_file_path()).replace(target)


def load(source: Path, folder: Path, operator: str) -> bool:
    """Let this process have the operators of `source`, if `folder` has them; `operator` is one of them."""
    file = library(source, folder)
    if not file.exists():
        return False
    try:
        if not hasattr(torch.ops.evermoe, operator):  # a process registers it once
            torch.ops.load_library(str(file))  # type: ignore[no-untyped-call]
        return hasattr(torch.ops.evermoe, operator)
    except OSError as error:
        log.warning("served without the compiled kernel: %s can't be loaded (%s)", file, error)
        return False


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    flags = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return " ".join(sorted(next(flags, "").split())) or platform.machine()
