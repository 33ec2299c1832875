"""Starts the installed `evermoe serve` as a user does, and looks at it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import yaml

from deploy.status import is_warm


class Service:
    """A running `evermoe serve`; seconds are counted from its start."""

    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self.process = process
        self.started = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since the command was typed."""
        return time.monotonic() - self.started

    def status(self) -> dict[str, Any]:
        """The service's own report; raise OSError while there is none."""
        with urllib.request.urlopen(f"{self.url}/evermoe/status", timeout=10) as answer:
            return dict(json.load(answer))

    @cached_property
    def model(self) -> str:
        """The served model's name."""
        return str(self.status()["model"])

    def stream(self, prompt: str | list[int], max_tokens: int) -> Iterator[str]:
        """The text chunks of a streamed completion; raise OSError where the service does not answer."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "stream": True,
                "temperature": 0, "ignore_eos": True}  # fmt: skip
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            for line in answer:
                text = line.decode().strip().removeprefix("data: ")
                if text and text != "[DONE]":
                    yield json.loads(text)["choices"][0]["text"]

    def first_token(self) -> float:
        """Seconds from the start of the command to the first streamed token."""
        while True:
            with contextlib.suppress(OSError):
                next(self.stream("def main():", 4))
                return self.age
            if self.process.poll() is not None:
                raise RuntimeError("`evermoe serve` ended before it answered")
            time.sleep(0.05)

    def apply(self, policy: dict[str, Any]) -> None:
        """Change the policy as an operator does."""
        evermoe = Path(sys.executable).parent / "evermoe"
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(policy, file)
            file.flush()
            subprocess.run([evermoe, "policy", "apply", file.name, "--url", self.url], check=True, stdout=sys.stderr)

    def replicas_ready(self, seen: dict[str, float]) -> bool:
        """Note when each replica appeared; whether all that are planned are there."""
        report = self.status()
        for unit in report["units"]:
            for replica in unit["replicas"]:
                seen.setdefault(replica["id"], self.age)
        return is_warm(report)


@contextlib.contextmanager
def serving(arguments: Sequence[str], cache: Path) -> Iterator[Service]:
    """`evermoe serve ARGUMENTS` on a free port, its prepared stores in `cache`; ended with SIGINT."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "evermoe"), "serve", *arguments, "--port", str(port)]
    environment = {**os.environ, "EVERMOE_CACHE": str(cache)}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            yield Service(f"http://127.0.0.1:{port}", process)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def private_mib(pid: int) -> float:
    """Memory that only this process has, MiB (unique set size)."""
    return float(psutil.Process(pid).memory_full_info().uss) / 2**20
