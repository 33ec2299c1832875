"""A preparation that is killed leaves nothing that looks complete, and the next one continues it."""

import gc
import multiprocessing
import os
import signal
import threading
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NoReturn

import pytest

from experts.store import ExpertStore, Manifest, StoreError, prepare
from tests.checkpoints import FAMILIES, write_checkpoint

FAMILY = "deepseek_v2"  # dense and expert layers, more than one step before and after
WRITES = 73  # tensors of its store
PLACES = {"before a record": 0, "before the manifest": WRITES, "before the rename": 0}
"""Where else a process is killed, and how many tensors need not be written again after that."""


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Fresh processes that have imported the slow things once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experts.preparation", "experts.store", "tests.checkpoints"])
    return context


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(FAMILY, tmp_path_factory.mktemp("checkpoint"), shards=2)


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return prepare(checkpoint, tmp_path_factory.mktemp("undisturbed") / "store").manifest


@pytest.fixture(scope="module")
def steps(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """For every tensor of an undisturbed preparation, in order, the step it belongs to."""
    labels: list[str] = []
    prepare(checkpoint, tmp_path_factory.mktemp("steps") / "store", progress=lambda _, __, what: labels.append(what))
    return labels


def die(*_: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit("unreachable")


def prepare_and_die(checkpoint: Path, store: Path, moment: int | str) -> None:
    """Prepare, and be killed after so many tensors or at the named place."""
    calls = 0

    def count(done: int, total: int, what: str) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            die()

    if moment == "before the manifest":
        Manifest.write = die  # type: ignore[method-assign, assignment]
    if moment == "before the rename":
        Path.rename = die  # type: ignore[method-assign, assignment]
    if moment == "before a record":
        Path.replace = die  # type: ignore[method-assign, assignment]
    prepare(checkpoint, store, progress=count)


def run(process: ForkServerProcess) -> int | None:
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("moment", [1, 20, 40, WRITES, *PLACES])
def test_killed_and_continued(
    moment: int | str,
    checkpoint: Path,
    undisturbed: Manifest,
    steps: list[str],
    processes: multiprocessing.context.ForkServerContext,
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    assert run(processes.Process(target=prepare_and_die, args=(checkpoint, store, moment))) == -signal.SIGKILL
    for path in (store, tmp_path / "store.partial"):
        with pytest.raises(StoreError, match="evermoe prepare"):
            ExpertStore.open(path)

    again: list[str] = []
    prepare(checkpoint, store, progress=lambda done, total, what: again.append(what))

    assert ExpertStore.open(store, verify=True).manifest == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    files = {str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()}
    assert files == {"manifest.json", *undisturbed.files}
    done = steps.index(steps[moment - 1]) if isinstance(moment, int) else PLACES[moment]
    assert [what for what in again if "earlier run" not in what] == steps[done:]


def test_every_tensor_is_reported_up_to_the_total(checkpoint: Path, tmp_path: Path) -> None:
    reports: list[tuple[int, int, str]] = []
    store = prepare(checkpoint, tmp_path / "store", progress=lambda *report: reports.append(report))
    assert len(reports) == WRITES
    done = [report[0] for report in reports]
    assert done == sorted(done)
    tensors = [name for name in store.manifest.files if name.endswith(".safetensors")]
    assert reports[-1][:2] == (reports[0][1], sum(store.manifest.files[name].size for name in tensors))


def test_another_checkpoint_is_not_mixed_in(
    undisturbed: Manifest, processes: multiprocessing.context.ForkServerContext, tmp_path: Path
) -> None:
    checkpoint, store = write_checkpoint(FAMILY, tmp_path / "checkpoint", seed=1), tmp_path / "store"
    run(processes.Process(target=prepare_and_die, args=(checkpoint, store, 60)))
    write_checkpoint(FAMILY, checkpoint)
    assert prepare(checkpoint, store).manifest.fingerprint == undisturbed.fingerprint


def test_a_partial_file_that_changed_is_written_again(
    checkpoint: Path,
    undisturbed: Manifest,
    processes: multiprocessing.context.ForkServerContext,
    tmp_path: Path,
) -> None:
    store, partial = tmp_path / "store", tmp_path / "store.partial"
    run(processes.Process(target=prepare_and_die, args=(checkpoint, store, 60)))
    with (partial / "experts" / "3.safetensors").open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    assert prepare(checkpoint, store).manifest == undisturbed
    ExpertStore.open(store, verify=True)


def test_processes_that_prepare_the_same_store_wait_for_each_other(
    checkpoint: Path,
    undisturbed: Manifest,
    processes: multiprocessing.context.ForkServerContext,
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    workers = [processes.Process(target=prepare, args=(checkpoint, store)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert ExpertStore.open(store, verify=True).manifest == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_who_waits_says_so_and_gets_the_finished_store(checkpoint: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    started, go_on, waiting = threading.Event(), threading.Event(), threading.Event()
    results: list[ExpertStore] = []

    def first(done: int, total: int, what: str) -> None:
        started.set()
        go_on.wait()

    def second(done: int, total: int, what: str) -> None:
        assert "another process" in what
        waiting.set()

    threads = [threading.Thread(target=lambda: results.append(prepare(checkpoint, store, progress=first)))]
    threads[0].start()
    started.wait()
    threads.append(threading.Thread(target=lambda: results.append(prepare(checkpoint, store, progress=second))))
    threads[1].start()
    assert waiting.wait(timeout=60)
    go_on.set()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]


def test_a_full_disk_is_said_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(StoreError, match=r"has 0.0 GB free and the store needs .* free some space"):
        prepare(checkpoint, tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot write the store to .*store.partial"):
        prepare(checkpoint, tmp_path / "file" / "store")


def own_memory() -> int:
    """Bytes of this process's memory that belong to no file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def test_memory_for_a_few_experts_is_enough(
    undisturbed: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 32, "num_hidden_layers": 2}
    monkeypatch.setitem(FAMILIES, "qwen3_moe", {**FAMILIES["qwen3_moe"], **wide, "mlp_only_layers": []})
    checkpoint = write_checkpoint("qwen3_moe", tmp_path / "checkpoint")
    layer = 32 * 3 * 256 * 256 * 4
    gc.collect()
    before, peak = own_memory(), 0

    def watch(done: int, total: int, what: str) -> None:
        nonlocal peak
        peak = max(peak, own_memory() - before)

    prepare(checkpoint, tmp_path / "store", progress=watch)
    assert peak < layer / 2


def test_an_empty_folder_may_become_the_store(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    prepare(checkpoint, tmp_path / "store")
    ExpertStore.open(tmp_path / "store", verify=True)
