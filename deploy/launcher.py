"""Serves one model on this machine: embedded Redis, a Ray cluster of its own, the Serve application."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from deploy.warm_pool import WarmPool, start_worker
from experts.preload import FOLDER
from placement.policy import Policy
from recovery.directory import Directory

if TYPE_CHECKING:
    from experts.store import ExpertStore

APP = "evermoe"

_WORKER_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray's workers yield to every other process of the host (niceness 15): a gateway must not.
    "RAY_worker_niceness": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "RAY_preload_python_modules": "experts.preload",
}


_WARM_POOL = "warm-pool"
_OURS = ("TMPDIR", FOLDER)
_POLL_S = 0.1
_STOP_S = 15.0
"""What the application's deployments have to end once their last request has."""

_MOST_TEMPORARY = 24
"""Characters: Ray's Unix sockets lie some 80 below it, and a socket's path has room for 107."""


class LaunchError(RuntimeError):
    """The service can't be started; the message is one line for the operator."""


def check_port(host: str, port: int) -> None:
    """Raise LaunchError where nobody could listen on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LaunchError(
                f"port {port} on {host} can't be used ({error.strerror}): free it or choose another --port"
            ) from error


@contextlib.contextmanager
def running(
    store: Callable[[], ExpertStore],
    policy: Policy,
    *,
    name: str,
    host: str,
    port: int,
    redis_url: str | None,
    record: Path | None = None,
) -> Iterator[None]:
    """The service, answering on ``host:port`` inside the context; raise LaunchError where it does not come up.

    `store` is called once the cluster is up: what it waits for is done while Ray starts.
    """
    with _run_folder() as folder, _redis(redis_url, folder) as url, local_ray(folder), _serve(policy) as serve:
        from deploy.app import assemble, namespace_of

        opened = store()
        application = assemble(opened, policy, url, name, listen=(host, port), record=record)
        try:
            serve.run(application, name=APP, route_prefix="/")
        except RuntimeError as error:
            logs = folder / "session_latest" / "logs" / "serve"
            raise LaunchError(f"the service did not come up ({error}): its logs are in {logs}") from error
        directory = Directory(url, namespace_of(opened, policy, name))
        with WarmPool(directory, folder / _WARM_POOL, start_worker):
            yield


@contextlib.contextmanager
def _serve(policy: Policy) -> Iterator[ModuleType]:
    """Ray Serve without a proxy: the api has a port of its own."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled")
    try:
        yield serve
    finally:
        with _hushed():
            _drain(serve, policy.api.drain_s + _STOP_S)
            serve.shutdown()


def _drain(serve: ModuleType, limit_s: float) -> None:
    """Delete the application, which ends its requests with manners; `serve.shutdown` alone has less patience."""
    if APP not in serve.status().applications:
        return
    serve.delete(APP, _blocking=False)
    deadline = time.monotonic() + limit_s
    while APP in serve.status().applications and time.monotonic() < deadline:
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _run_folder() -> Iterator[Path]:
    """A folder that goes with the service; kept where the service failed, for its logs."""
    base = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="evermoe-", dir=base if len(base) <= _MOST_TEMPORARY else "/tmp"))
    failed = False
    try:
        yield folder
    except Exception:
        failed = True
        raise
    finally:
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _redis(url: str | None, folder: Path) -> Iterator[str]:
    if url is not None:
        yield url
        return
    from recovery.redis_server import RedisServer

    with RedisServer(folder / "redis") as server:
        yield server.url


@contextlib.contextmanager
def local_ray(folder: Path) -> Iterator[None]:
    """A Ray cluster of this host alone, reachable through the loopback interface; its files lie in `folder`."""
    pool = {FOLDER: str(folder / _WARM_POOL)}
    with _environment({**_WORKER_ENVIRONMENT, **pool, "TMPDIR": str(folder)}):
        import ray

        try:
            _start_ray(folder)
            yield
        finally:
            with _hushed():
                ray.shutdown()


def _start_ray(folder: Path) -> None:
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)  # its greetings say nothing an operator could act on
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=100 * 1024 * 1024,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
        )
    except (OSError, RuntimeError) as error:
        raise LaunchError(f"Ray did not start ({error}): its logs are in {folder}") from error


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the processes Ray starts. What the operator has set stays, but for our folders."""
    before = dict(os.environ)
    os.environ.update({key: value for key, value in values.items() if key in _OURS or key not in before})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep what Ray says of itself off the operator's terminal."""
    nowhere = io.StringIO()
    with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield
