"""What compiled code depends on beside its source: it is compiled for one machine's processor and one torch."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch


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


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    flags = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return " ".join(sorted(next(flags, "").split())) or platform.machine()
