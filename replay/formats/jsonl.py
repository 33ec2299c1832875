"""Our own traces: ``{"time_s": 0.25, "prompt_tokens": 374, "answer_tokens": 44, "kind": "code", "hash_ids": [7]}``.

`kind` and `hash_ids` may be missing. This is what `evermoe trace make` and `evermoe trace convert` write.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO

import msgspec

from replay.formats.columns import Row, seconds_ns
from replay.formats.json_rows import JsonFormat
from replay.trace import Chunk, requests


class _Line(msgspec.Struct, omit_defaults=True):
    time_s: float
    prompt_tokens: int
    answer_tokens: int
    kind: str = ""
    hash_ids: tuple[int, ...] = ()


def _row(line: _Line) -> Row:
    return Row(seconds_ns("time_s", line.time_s), line.prompt_tokens, line.answer_tokens, line.hash_ids, line.kind)


FORMAT = JsonFormat(
    name="evermoe",
    looks="JSON lines: time_s, prompt_tokens, answer_tokens",
    schema=_Line,
    keys=frozenset({"time_s", "prompt_tokens", "answer_tokens"}),
    lengths=("prompt_tokens", "answer_tokens"),
    as_row=_row,
)


def write(chunks: Iterable[Chunk], file: IO[bytes]) -> int:
    """Write `chunks` to `file` as they come; how many requests that were."""
    encoder = msgspec.json.Encoder()
    rows = 0
    for chunk in chunks:
        lines = [
            _Line(round(row.time_s, 9), row.prompt_tokens, row.answer_tokens, row.kind, row.hash_ids)
            for row in requests([chunk])
        ]
        file.write(encoder.encode_lines(lines))
        rows += len(lines)
    return rows
