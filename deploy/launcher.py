"""Serves one model on this machine: embedded Redis, a Ray cluster of its own, the Serve application."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from experts.store import ExpertStore
from placement.policy import Policy

APP = "evermoe"

_WORKER_ENVIRONMENT = {
    # A replica's Python and torch come from workers that Ray starts ahead of time: 0.2 s instead of 2.9 s.
    "RAY_preload_python_modules": "torch",
    "RAY_enable_worker_prestart": "1",
    # Bounded spinning keeps OpenMP fast without letting idle threads of one process take another's core.
    "GOMP_SPINCOUNT": "20000",
    "RAY_AUTH_MODE": "disabled",  # the cluster listens on the loopback interface only
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


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
    store: ExpertStore, policy: Policy, *, name: str, host: str, port: int, redis_url: str | None
) -> Iterator[None]:
    """The service, answering on ``host:port`` inside the context; raise LaunchError where it does not come up."""
    with _run_folder() as folder, _redis(redis_url, folder) as url, local_ray(folder):
        from ray import serve

        from deploy.app import assemble

        logging.getLogger("ray.serve").setLevel(logging.WARNING)

        application = assemble(store, policy, url, name)
        serve.start(http_options={"host": host, "port": port}, proxy_location="HeadOnly")
        try:
            serve.run(application, name=APP, route_prefix="/")
            yield
        except RuntimeError as error:
            raise LaunchError(
                f"the service did not come up ({error}): see the logs in {folder}/session_latest/logs"
            ) from error
        finally:
            with _hushed():
                serve.shutdown()


@contextlib.contextmanager
def _run_folder() -> Iterator[Path]:
    """A short path (Unix sockets have little room) that goes with the service; kept where the service failed."""
    folder = Path(tempfile.mkdtemp(prefix="evermoe-"))
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
    os.environ.update({key: os.environ.get(key, value) for key, value in _WORKER_ENVIRONMENT.items()})
    import ray

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
        yield
    finally:
        with _hushed():
            ray.shutdown()


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Keep what Ray prints about actors that end (as they were told to) off the operator's terminal."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
