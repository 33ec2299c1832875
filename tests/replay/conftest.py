"""Traces in the layouts that the public ones have, a few rows each; the lengths and times are made up."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.2225678,879,55
2023-11-16 18:16:46.6805900,91,16
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:00.017335+00:00,2399,6
2024-05-10 00:00:01+00:00,76,15
2024-05-11 02:00:00.009930+02:00,3,1
"""
BURSTGPT = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
118,GPT-4,417,0,417,Conversation log
118.5,ChatGPT,1360,203,1563,API log
"""
BURSTGPT_NEWER = """Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,1722ac82-0a46-4bf0-aa08-89794e7a2b3f,43,GPT-4,906,446,1352,Conversation log
19440161.0,d5983bf9-4b48-497b-892b-a58995247443,2,ChatGPT,36,29,65,Conversation log
19440161.5,,1,ChatGPT,36,0,36,"API log, failed"
"""
MOONCAKE = """{"timestamp": 0, "input_length": 1100, "output_length": 6, "hash_ids": [0, 1, 2]}
{"timestamp": 40, "input_length": 600, "output_length": 4, "hash_ids": [0, 7]}
{"timestamp": 40, "input_length": 28, "output_length": 445, "hash_ids": [8]}
{"timestamp": 12277, "input_length": 1030, "output_length": 3, "hash_ids": [0, 1, 9]}
"""
EVERMOE = """{"time_s": 0.0, "prompt_tokens": 374, "answer_tokens": 44}
{"time_s": 0.25, "prompt_tokens": 30, "answer_tokens": 4, "kind": "code", "hash_ids": [7]}
{"time_s": 1.0000001, "prompt_tokens": 3, "answer_tokens": 0}
"""
TEXTS = {
    "azure-2023": AZURE_2023, "azure-2024": AZURE_2024, "burstgpt": BURSTGPT, "mooncake": MOONCAKE, "evermoe": EVERMOE,
}  # fmt: skip

WriteTrace = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> WriteTrace:
    """Write a text as a trace, zipped where its name says so."""

    def write_trace(text: str | bytes, name: str = "trace.csv") -> Path:
        path = tmp_path / name
        data = text if isinstance(text, bytes) else text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write_trace
