"""Learning from the load stream, in a process of the lowest priority beside the planner.

python -m deploy.planner.training RECORDINGS MODELS HORIZON_S     trains from RECORDINGS/*.npz into the folder MODELS
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import numpy as np

from predictor.horizon import HORIZONS, Horizon
from predictor.records import Records
from predictor.shape import ModelShape

log = logging.getLogger(__name__)

_TERMINATED_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_MOST_STEPS = 200_000
_MOST_BYTES = 256 << 20
"""Bounds for what is remembered to learn from."""


class Memory:
    """The latest steps of the load stream, as they came."""

    def __init__(self) -> None:
        self._blocks: deque[tuple[str, Records]] = deque()
        self._steps = 0
        self._bytes = 0

    def add(self, gateway: str, records: Records) -> None:
        """Remember steps of a gateway, and forget the oldest ones beyond the bounds."""
        self._blocks.append((gateway, records))
        self._steps += len(records)
        self._bytes += _size(records)
        while self._steps > _MOST_STEPS or (self._bytes > _MOST_BYTES and len(self._blocks) > 1):
            _, oldest = self._blocks.popleft()
            self._steps -= len(oldest)
            self._bytes -= _size(oldest)

    def recordings(self) -> list[Records]:
        """What is remembered; steps of one gateway in a row are one recording."""
        return [_joined([r for _, r in blocks]) for _, blocks in groupby(self._blocks, key=lambda block: block[0])]


class Training:
    """Trains one predictor at a time into the folder `models`. Close it when done."""

    def __init__(self, models: Path, horizon_s: float) -> None:
        self._models = models
        self.horizon_s = horizon_s
        """The horizon to learn besides the usual ones."""
        self._process: subprocess.Popen[str] | None = None
        self._folder: Path | None = None

    @property
    def busy(self) -> bool:
        """Whether a training runs, or has ended and was not asked about."""
        return self._process is not None

    def start(self, recordings: Iterable[Records]) -> None:
        """Begin to train from `recordings`."""
        self._folder = Path(tempfile.mkdtemp(prefix="evermoe-training-"))
        for number, records in enumerate(recordings):
            _write(records, self._folder / f"{number}.npz")
        command = [
            sys.executable,
            "-m",
            "deploy.planner.training",
            str(self._folder),
            str(self._models),
            str(self.horizon_s),
        ]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True, env={**os.environ, **_ENVIRONMENT},
        )  # fmt: skip

    def ended(self) -> bool | None:
        """Whether the training brought a new version; None while it runs. Asked once, it is forgotten."""
        if self._process is None or self._process.poll() is None:
            return None
        process = self._process
        said = process.stderr.read().strip().splitlines() if process.stderr else []
        self._forget()
        if process.returncode:
            log.warning("no predictor was trained: %s", said[-1] if said else "the training was killed")
        return not process.returncode

    def close(self) -> None:
        """End it, done or not."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._forget()

    def _forget(self) -> None:
        if self._process is not None and self._process.stderr is not None:
            self._process.stderr.close()
        self._process = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


_COLUMNS = tuple(field.name for field in dataclasses.fields(Records) if field.name != "shape")


def _size(records: Records) -> int:
    return sum(int(getattr(records, name).nbytes) for name in _COLUMNS)


def _joined(blocks: list[Records]) -> Records:
    columns = {name: np.concatenate([getattr(block, name) for block in blocks]) for name in _COLUMNS}
    return Records(shape=blocks[0].shape, **columns)


def _write(records: Records, file: Path) -> None:
    columns = {name: getattr(records, name) for name in _COLUMNS}
    np.savez(file, shape=np.array(records.shape.to_json()), **columns)


def _read(file: Path) -> Records:
    with np.load(file) as columns:
        return Records(shape=ModelShape.from_json(str(columns["shape"])), **{name: columns[name] for name in _COLUMNS})


def main() -> None:
    """Train as long as the parent lives; exit with one line where nothing can be learned."""
    if len(sys.argv) != 4:
        sys.exit("usage: python -m deploy.planner.training RECORDINGS MODELS HORIZON_S")
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # it runs where nobody else wants to
    ctypes.CDLL(None).prctl(_TERMINATED_WITH_PARENT, signal.SIGKILL)
    from predictor.storage import save
    from predictor.training import train

    recordings = [_read(file) for file in sorted(Path(sys.argv[1]).glob("*.npz"))]
    horizons = dict.fromkeys([*HORIZONS, Horizon(seconds=float(sys.argv[3]))])
    try:
        save(train(recordings, horizons=list(horizons)), sys.argv[2])
    except (ValueError, OSError) as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
