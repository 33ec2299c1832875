"""Decoder layers that were compiled in another process say what transformers says; without them everything goes on."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils import _pytree as pytree

from experts import kernels, native_code
from gateway import compilation, compiled_layers, layer_ops, paged_decode
from gateway.compilation import Compilation, Echo, adopt, compile_layers
from gateway.compiled_layers import CallPattern, CompiledLayer, UncompilableError
from gateway.masks import MaskRule
from gateway.model import GatewayModel
from tests.checkpoints import FAMILIES
from tests.gateway.inline_model import InlineFamily, answer_all, drain, prompts, single_threaded, submit

ROOT = Path(__file__).parents[2]
PROMPTS = prompts(3, 11, 29)
COMPILED = {"mixtral": 1, "deepseek_v3": 2, "gpt_oss": 2, "qwen3_moe": 2}
"""Kinds of layers in each family: by window, dense or of experts."""

FamilyOf = Callable[[str], InlineFamily]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with single_threaded():
        yield


@pytest.fixture(scope="module")
def family_of(tmp_path_factory: pytest.TempPathFactory) -> FamilyOf:
    """Each family's tiny model, made once, and not compiled."""
    made: dict[str, InlineFamily] = {}

    def of(family: str) -> InlineFamily:
        if family not in made:
            made[family] = InlineFamily(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


def copy_kernels(source: Path, target: Path) -> None:
    for kernel in source.glob("*.so"):
        shutil.copy(kernel, target)


@pytest.fixture(scope="module")
def folders(family_of: FamilyOf, compiled_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What is compiled of each of `COMPILED`: one beside this process, as gateways do it, and the others in it."""
    made = {family: tmp_path_factory.mktemp(f"compiled-{family}") for family in COMPILED}
    for folder in made.values():
        copy_kernels(compiled_folder, folder)
    done = threading.Event()
    beside = Compilation(family_of("mixtral").store.path, made["mixtral"], done.set)
    beside.start()
    for family in ("deepseek_v3", "gpt_oss", "qwen3_moe"):
        with warnings.catch_warnings(action="ignore"):
            assert not compile_layers(family_of(family).store.path, made[family])
    assert done.wait(200)
    beside.close()
    return made


def packages(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def libraries(package: Path) -> list[Path]:
    """The compiled code in a package."""
    found = [path for path in package.rglob("*.so") if path.is_file()]
    assert found
    return found


def fresh(one: InlineFamily) -> InlineFamily:
    """The same family with a model of its own."""
    other = object.__new__(InlineFamily)
    vars(other).update(vars(one), model=one.load())
    return other


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "compiled"))


def expected(one: InlineFamily) -> list[list[int]]:
    return [one.generate(prompt, 32) for prompt in PROMPTS]


def runs_compiled(model: GatewayModel) -> list[bool]:
    return [isinstance(layer.forward, CompiledLayer) for layer in model.layers]


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("family", COMPILED)
@pytest.mark.parametrize("with_kernel", [True, False])
def test_equals_generate_with_chunked_prompts_beside_decoding(
    family_of: FamilyOf, folders: dict[str, Path], kernel: Path, monkeypatch: pytest.MonkeyPatch, family: str,
    with_kernel: bool, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    one = fresh(family_of(family))
    assert adopt(one.model, folders[family])
    assert one.model.compiled == len(one.model.layers)
    assert all(runs_compiled(one.model))
    if not with_kernel:
        monkeypatch.setattr(paged_decode, "_kernel", None)
    engine = one.engine(token_budget=7, max_sequences=4)
    assert answer_all(engine, PROMPTS) == expected(one)
    assert engine.pool.used == 0
    assert warned(caplog) == []


@pytest.mark.parametrize("family", COMPILED)
def test_answers_do_not_depend_on_who_comes_goes_and_is_preempted(
    family_of: FamilyOf, folders: dict[str, Path], kernel: Path, family: str
) -> None:
    one = fresh(family_of(family))
    adopt(one.model, folders[family])
    block_bytes = 4 * 4 * sum(shape.numbers for shape in one.model.kv_shapes.values())
    engine = one.engine(token_budget=16, max_sequences=3, kv_cache_gib=17.5 * block_bytes / 2**30)
    assert answer_all(engine, PROMPTS) == expected(one)
    assert engine.scheduler.preemptions > 0


def test_a_model_is_taken_over_between_two_steps(
    family_of: FamilyOf, folders: dict[str, Path], kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_decode, "_kernel", None)
    one = fresh(family_of("gpt_oss"))
    engine = one.engine(token_budget=7, max_sequences=4)
    for number, prompt in enumerate(PROMPTS):
        engine.add(submit(str(number), prompt))
    steps = 0

    def between() -> None:
        nonlocal steps
        steps += 1
        if steps == 9:
            assert adopt(one.model, folders["gpt_oss"])
            assert one.model.compiled == 2

    assert [answer for _, answer in sorted(drain(engine, between).items())] == expected(one)
    assert steps > 30
    assert all(runs_compiled(one.model))
    assert paged_decode.loaded()


def test_decoding_rows_ask_python_for_experts_only(
    family_of: FamilyOf, folders: dict[str, Path], kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = fresh(family_of("qwen3_moe"))
    assert adopt(one.model, folders["qwen3_moe"])
    engine = one.engine()
    asked: set[tuple[str, int]] = set()

    def noting(name: str) -> Callable[..., torch.Tensor]:
        served = getattr(one.model.calls, name)

        def answer(layer: int, *args: Any) -> torch.Tensor:
            asked.add((name, layer))
            out: torch.Tensor = served(layer, *args)
            return out

        return answer

    for name in ("linear", "attend"):
        monkeypatch.setattr(one.model.calls, name, noting(name))
    for number, prompt in enumerate(PROMPTS):
        engine.add(submit(str(number), prompt))
    first = {delta.request_id: delta.token_ids for delta in engine.step()}
    odd = {("linear", 1)}  # a dense layer with a width that does not fill vectors
    assert asked == odd | {("attend", layer) for layer in range(3)}  # prompts
    asked.clear()
    rest = drain(engine)
    assert asked == odd
    assert [first[name] + rest[name] for name in sorted(first)] == expected(one)


@pytest.mark.parametrize("family", COMPILED)
def test_layers_of_one_kind_share_a_package(family_of: FamilyOf, folders: dict[str, Path], family: str) -> None:
    assert len(packages(folders[family])) == COMPILED[family] <= len(family_of(family).model.layers)


def test_a_compilation_leaves_whole_files_and_nothing_else(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        built = {paged_decode.library(folder), kernels.library(folder)}
        assert {*folder.iterdir()} == {*built, *packages(folder)}
        assert all(len(package.name) == 24 for package in packages(folder))


@pytest.mark.parametrize("damage", [b"", b"not a library", None])
def test_a_damaged_package_leaves_the_layers_as_they_are(
    family_of: FamilyOf, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture,
    damage: bytes | None,
) -> None:  # fmt: skip
    one, folder = fresh(family_of("mixtral")), copied(folders["mixtral"], tmp_path)
    [package] = packages(folder)
    for file in libraries(package):
        file.unlink()
        if damage is not None:
            file.write_bytes(damage)
    assert adopt(one.model, folder)  # there is nothing to compile
    assert one.model.compiled == 0
    assert not any(runs_compiled(one.model))
    warning = warned(caplog)[-1]  # torch has its own to say
    assert warning.startswith("not all decoder layers run compiled: layers 0, 1, 2: ")
    assert answer_all(one.engine(token_budget=7, max_sequences=4), PROMPTS) == expected(one)


def test_the_package_of_another_family_is_refused(
    family_of: FamilyOf, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, folder = fresh(family_of("mixtral")), copied(folders["mixtral"], tmp_path)
    shutil.rmtree(packages(folder)[0])
    shutil.copytree(packages(folders["gpt_oss"])[0], folder / packages(folders["mixtral"])[0].name)
    assert adopt(one.model, folder)  # there is nothing to compile
    assert one.model.compiled == 0
    [warning] = warned(caplog)
    assert "constant" in warning
    assert answer_all(one.engine(token_budget=7, max_sequences=4), PROMPTS) == expected(one)


def test_what_is_there_is_taken_and_the_rest_stays(
    family_of: FamilyOf, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, folder = fresh(family_of("deepseek_v3")), copied(folders["deepseek_v3"], tmp_path)
    shutil.rmtree(packages(folder)[0])
    assert not adopt(one.model, folder)
    assert one.model.compiled == 2
    assert sorted(runs_compiled(one.model)) == [False, False, True, True]
    assert warned(caplog) == []  # it may still come
    assert answer_all(one.engine(token_budget=7, max_sequences=4), PROMPTS) == expected(one)


def test_an_empty_folder_changes_nothing(family_of: FamilyOf, tmp_path: Path) -> None:
    one = fresh(family_of("mixtral"))
    assert not adopt(one.model, tmp_path)
    assert not adopt(one.model, tmp_path / "nothing")
    assert one.model.compiled == 0
    assert not any(runs_compiled(one.model))


def kinds(model: GatewayModel) -> dict[Path, tuple[int, CallPattern]]:
    """A layer of each kind, and how it is called."""
    found: dict[Path, tuple[int, CallPattern]] = {}
    for index, package in enumerate(compilation._packages(model, Path())):
        assert not isinstance(package, UncompilableError)
        found.setdefault(package[1], (index, package[0]))
    return found


@contextmanager
def answered_by_echo(model: GatewayModel) -> Iterator[None]:
    """Attention and experts of `model` are stand-ins meanwhile."""
    model.calls.step = Echo()
    with model.calls.answered_by(Echo.experts), layer_ops.answering(model.calls):
        yield


class Exported:
    """A layer's exported program in place of its compiled form."""

    def __init__(self, model: GatewayModel, index: int, pattern: CallPattern) -> None:
        self._program: Any = compiled_layers.export(model.layers[index], pattern).module()
        self._note, self._index, self._pattern = model.calls.note_rule, index, pattern

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        self._note(self._index, next(leaf for leaf in leaves if isinstance(leaf, MaskRule)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        out = self._program(*tensors, torch.tensor(self._index))
        return (out,) if self._pattern.tuple_out else out


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_layers_can_be_exported(family_of: FamilyOf, family: str) -> None:
    """What is left, to compile the program, is up to torch."""
    model = family_of(family).model
    for index, pattern in kinds(model).values():
        exported: Any = Exported(model, index, pattern)
        with torch.no_grad(), answered_by_echo(model):
            compiled_layers.check(model.layers[index], exported, pattern)


def test_a_layer_that_gives_other_numbers_is_refused(family_of: FamilyOf) -> None:
    model = family_of("mixtral").model
    [(index, pattern)] = kinds(model).values()
    layer = model.layers[index]
    with torch.no_grad(), answered_by_echo(model):
        compiled_layers.check(layer, layer, pattern)  # type: ignore[arg-type]
        for off in (lambda out: out * 1.01, lambda out: out * float("nan")):
            wrong: Any = lambda *args, off=off, **kwargs: off(layer(*args, **kwargs))  # noqa: E731
            with pytest.raises(UncompilableError, match="rows agree with their compiled form"):
                compiled_layers.check(layer, wrong, pattern)


def test_packages_are_told_apart_by_what_they_are_made_of(family_of: FamilyOf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_of("mixtral").model
    [(index, pattern)] = kinds(model).values()
    layer = model.layers[index]
    name = compiled_layers.signature(layer, pattern)
    assert compiled_layers.signature(model.layers[index + 1], pattern) == name
    norm: Any = layer.input_layernorm
    monkeypatch.setattr(norm, "variance_epsilon", 0.5)
    assert compiled_layers.signature(layer, pattern) != name
    monkeypatch.undo()
    assert compiled_layers.signature(layer, pattern) == name
    monkeypatch.setattr(native_code, "made_for", lambda: "another processor")
    assert compiled_layers.signature(layer, pattern) != name


def test_a_kind_that_fails_does_not_keep_the_others_from_being_compiled(
    family_of: FamilyOf, tmp_path: Path, compiled_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def package(layer: Any, pattern: CallPattern, folder: Path) -> None:
        if hasattr(layer.mlp, "experts"):
            raise NotImplementedError("torch can't\nsecond line")
        folder.mkdir()

    copy_kernels(compiled_folder, tmp_path)
    monkeypatch.setattr(compilation, "package", package)
    refused = compile_layers(family_of("deepseek_v3").store.path, tmp_path)
    assert str(refused) == "layers 2, 3: NotImplementedError: torch can't"
    assert len(packages(tmp_path)) == 1


def test_a_package_that_another_process_made_meanwhile_will_do(
    family_of: FamilyOf, tmp_path: Path, compiled_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def package(layer: Any, pattern: CallPattern, folder: Path) -> None:
        folder.mkdir()
        raise OSError("Directory not empty")

    copy_kernels(compiled_folder, tmp_path)
    monkeypatch.setattr(compilation, "package", package)
    assert not compile_layers(family_of("mixtral").store.path, tmp_path)


def test_layers_called_in_a_way_of_their_own_stay_as_they_are(
    family_of: FamilyOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = fresh(family_of("mixtral"))
    numbers = iter(range(100))
    one.model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, f"odd{next(numbers)}": 1}), with_kwargs=True
    )
    adopt(one.model, tmp_path)
    assert one.model.compiled == 0
    assert warned(caplog) == [
        "not all decoder layers run compiled: layers 1: the model calls its layers in different ways"
    ]


def run_compiler(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway.compilation", *args],
        capture_output=True, text=True, env={**os.environ, **env}, cwd=ROOT,
    )  # fmt: skip


def test_without_a_compiler_it_says_so_in_one_line(family_of: FamilyOf, tmp_path: Path) -> None:
    done = run_compiler(str(family_of("mixtral").store.path), str(tmp_path / "f"), CXX="no-such-compiler")
    assert done.returncode == 1
    assert done.stderr == "there is no C++ compiler here; install g++, or name one in CXX\n"
    assert not (tmp_path / "f").exists()


def test_without_a_store_it_says_so_in_one_line(tmp_path: Path, compiled_folder: Path) -> None:
    done = run_compiler(str(tmp_path / "none"), str(tmp_path / "f"))
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert str(tmp_path / "none") in line
    assert run_compiler().stderr.startswith("usage: ")


def test_what_is_compiled_is_not_compiled_again(family_of: FamilyOf, folders: dict[str, Path]) -> None:
    before = {file: file.stat().st_mtime_ns for file in folders["gpt_oss"].iterdir()}
    done = run_compiler(str(family_of("gpt_oss").store.path), str(folders["gpt_oss"]))
    assert done.returncode == 0, done.stderr
    assert {file: file.stat().st_mtime_ns for file in folders["gpt_oss"].iterdir()} == before


def test_a_compilation_that_fails_is_told_in_one_line(
    family_of: FamilyOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = threading.Event()
    one = Compilation(family_of("mixtral").store.path, tmp_path, done.set)
    one.start()
    assert done.wait(120)
    one.close()
    assert warned(caplog) == [
        "decoder layers are not compiled: there is no C++ compiler here; install g++, or name one in CXX"
    ]


def test_closed_in_the_middle_nothing_is_left(
    family_of: FamilyOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    compiled_folder: Path,
) -> None:  # fmt: skip
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    done = threading.Event()
    one = Compilation(family_of("mixtral").store.path, tmp_path / "folder", done.set)
    one.start()
    wait_for(lambda: any(process.name() in ("cc1plus", "g++") for process in mine(tmp_path)))
    one.close()
    one.close()
    assert not done.is_set()
    wait_for(lambda: not mine(tmp_path), within=10)
    assert not list(scratch.iterdir())
    assert not list((tmp_path / "folder").iterdir())
    assert warned(caplog) == []


def test_closed_before_it_starts_nothing_runs(tmp_path: Path) -> None:
    one = Compilation(tmp_path, tmp_path / "folder", lambda: None)
    one.close()
    one.start()
    one.close()
    assert not mine(tmp_path)


def mine(folder: Path) -> list[psutil.Process]:
    """Processes that work in or on `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and str(folder) in " ".join([*process.cmdline(), process.cwd()]):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_for(condition: Callable[[], bool], within: float = 120.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
