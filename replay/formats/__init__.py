"""What traces look like: one file for each format, and who recognises whom."""

from __future__ import annotations

from replay.formats import azure_2023, azure_2024, burstgpt, jsonl, mooncake
from replay.formats.columns import TraceFormat
from replay.trace import TraceError

FORMATS: tuple[TraceFormat, ...] = (
    azure_2023.FORMAT,
    azure_2024.FORMAT,
    burstgpt.FORMAT,
    mooncake.FORMAT,
    jsonl.FORMAT,
)
_LFS = "version https://git-lfs"


def detect(name: str, head: list[str]) -> TraceFormat:
    """The format of a file called `name`, by its first lines; raise TraceError where it is none of ours."""
    if head[0].startswith(_LFS):
        raise TraceError(f"{name} is a Git LFS pointer, not the file it stands for: get that with `git lfs pull`")
    for trace_format in FORMATS:
        if trace_format.recognises(head):
            return trace_format
    known = "; ".join(f"{trace_format.name} ({trace_format.looks})" for trace_format in FORMATS)
    raise TraceError(f"{name} is no trace in a known format: it begins with {head[0][:80]!r}. Known are {known}")
