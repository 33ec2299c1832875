"""The installed `evermoe serve` as a process, its client, and what it says of itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.waiting import eventually

EVERMOE = str(Path(sys.executable).parent / "evermoe")
PROMPT = "import os\n\ndef main():\n"


class Served:
    """A running `evermoe serve`."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.output = folder / "output"
        self.temporary = Path(tempfile.mkdtemp(prefix="e-", dir="/tmp"))  # short: Unix sockets have little room
        environment = {**os.environ, "EVERMOE_CACHE": str(folder / "cache"), "TMPDIR": str(self.temporary)}
        environment.pop("REDIS_URL", None)
        command = [EVERMOE, "serve", "--port", str(self.port), "--dtype", "float32", *arguments]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0)

    def wait(self) -> None:
        eventually(self._healthy, 120, "the service answers")

    def _healthy(self) -> bool:
        assert self.process.poll() is None, self.output.read_text()
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def status(self) -> dict[str, Any]:
        answer = httpx.get(f"{self.url}/evermoe/status", timeout=30)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def ready(self) -> int:
        return sum(unit["ready"] for unit in self.status()["units"])

    def wait_for_replicas(self) -> None:
        eventually(lambda: self.ready() == 8, 120, "all replicas are ready")

    def calls(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for unit in self.status()["units"]:
            for path, count in unit["calls"].items():
                total[path] = total.get(path, 0) + count
        return total

    def stream(self, max_tokens: int, on_chunk: Callable[[int], None] = lambda number: None) -> str:
        chunks = self.client.completions.create(
            model="evermoe-tiny", prompt=PROMPT, max_tokens=max_tokens, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        text = ""
        for number, chunk in enumerate(chunks):
            on_chunk(number)
            text += chunk.choices[0].text if chunk.choices else ""
        return text

    def close(self) -> None:
        """End it, as Ctrl-C does."""
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)
        shutil.rmtree(self.temporary, ignore_errors=True)


@contextlib.contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Served]:
    """`evermoe serve ARGUMENTS`, answering."""
    running = Served(folder, *arguments)
    try:
        running.wait()
        yield running
    finally:
        running.close()
