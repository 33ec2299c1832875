"""One Ray cluster for all tests that need one; nothing of it is left afterwards."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from recovery.redis_server import RedisServer


def pytest_configure() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread only gets in the way
    # Torch makes this folder as soon as modeling code is imported: not in /tmp, where it would stay.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="evermoe-inductor-")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def free_port() -> int:
    """A port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def ray_cluster(free_port: int) -> Iterator[int]:
    """A local Ray cluster with Serve; the port of its HTTP proxy."""
    from deploy.launcher import local_ray

    folder = Path(tempfile.mkdtemp(prefix="evermoe-"))  # short: Unix socket paths have little room
    try:
        with local_ray(folder):
            from ray import serve

            serve.start(http_options={"host": "127.0.0.1", "port": free_port}, proxy_location="HeadOnly")
            yield free_port
            serve.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A real Redis server for the session."""
    with RedisServer() as server:
        yield server.url


@pytest.fixture(scope="session")
def compiled_folder() -> Iterator[Path]:
    """A folder with the compiled kernels, made once a session; compiled layers may be put there too."""
    from experts import kernels
    from experts.native_code import NoCompilerError
    from gateway import paged_decode

    folder = Path(tempfile.mkdtemp(prefix="evermoe-"))
    try:
        paged_decode.build(folder)
        kernels.build(folder)
        yield folder
    except NoCompilerError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
