"""What Ray imports in every worker of a cluster that the launcher starts (`RAY_preload_python_modules`).

Importing it costs nothing, but in a worker that was started for the warm pool: that one finds a token in the pool's
folder, takes it, and imports what a replica needs, so that a replica that starts in it is there at once.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

FOLDER = "EVERMOE_WARM_POOL"
"""Environment variable: the folder of the warm pool's tokens, on this host."""
TOKEN = "wanted-"
READY = "ready-"


def import_gently() -> None:
    """Import torch in a thread of low priority: replicas that start leave the cores to processes that serve."""

    def work() -> None:
        os.nice(10)  # on Linux it is the thread's own
        import experts.replica  # noqa: F401

    thread = threading.Thread(target=work, name="import")
    thread.start()
    thread.join()


def warm_up(folder: Path) -> None:
    """Where there is a token, take it, import, and leave a file with this process's id."""
    for token in folder.glob(f"{TOKEN}*"):
        try:
            token.unlink()
        except FileNotFoundError:
            continue  # another worker was faster
        import_gently()
        (folder / f"{READY}{os.getpid()}").touch()
        return


if FOLDER in os.environ:
    warm_up(Path(os.environ[FOLDER]))
