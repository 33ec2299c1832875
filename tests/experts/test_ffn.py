"""A slice computes what the family's own experts module computes, and costs memory only while it is loaded."""

import ctypes
import inspect
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts, MuseSparkTextConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHExperts

from experts import families
from experts.ffn import ExpertFFN
from experts.manifest import SliceForm
from experts.matrix import PlainMatrix
from experts.store import ExpertStore, StoreError, prepare
from tests.checkpoints import FAMILIES, VOCABULARY, write_checkpoint

PROMPTS = ([5, 17, 99, 42, 3], [7], list(range(100, 112)))


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(request.param, tmp_path_factory.mktemp(request.param) / "checkpoint")


@pytest.fixture(scope="module")
def store(checkpoint: Path) -> ExpertStore:
    return prepare(checkpoint, checkpoint.with_name("store"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    folder = tmp_path_factory.mktemp("mixtral")
    return prepare(write_checkpoint("mixtral", folder / "checkpoint"), folder / "store")


def one_expert(module: nn.Module, expert: int, rows: torch.Tensor) -> torch.Tensor:
    """What transformers' own code makes of `rows` if all are routed to `expert` with weight one."""
    forward = inspect.unwrap(type(module).forward)  # without the choice of an implementation
    with torch.no_grad():
        index = torch.full((len(rows), 1), expert)
        result: torch.Tensor = forward(module, rows, index, torch.ones(len(rows), 1, dtype=rows.dtype))
    return result


def assert_close(result: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    assert torch.isfinite(expected).all()
    assert expected.abs().max() > 0
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()


def test_every_slice_equals_the_familys_own_module(store: ExpertStore, model: PreTrainedModel) -> None:
    ffn = ExpertFFN(store)
    torch.manual_seed(0)
    rows = torch.randn(7, store.manifest.hidden_size) * 3  # wide enough for clamps to matter
    for layer, module in families.moe_modules(model).items():
        for expert in range(store.manifest.num_experts):
            assert_close(ffn(layer, expert, rows), one_expert(module, expert, rows))


def test_segments_of_several_experts_fill_a_given_tensor(store: ExpertStore, model: PreTrainedModel) -> None:
    ffn = ExpertFFN(store)
    layer, module = next(iter(families.moe_modules(model).items()))
    rows = torch.randn(9, store.manifest.hidden_size)
    memory = torch.full((11, store.manifest.hidden_size), 7.0)
    ffn.compute(layer, [(2, 4), (0, 1), (3, 0), (1, 4)], rows, memory[1:10])
    expected = [one_expert(module, expert, rows[a:b]) for expert, a, b in ((2, 0, 4), (0, 4, 5), (1, 5, 9))]
    assert_close(memory[1:10], torch.cat(expected))
    assert torch.equal(memory[[0, 10]], torch.full((2, store.manifest.hidden_size), 7.0))


@pytest.fixture
def slices_only(store: ExpertStore, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The ordinary model with its experts computed slice by slice from the store."""
    ffn = ExpertFFN(store)

    def run(module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(hidden)
        for rank in range(index.shape[1]):
            for expert in range(store.manifest.num_experts):
                chosen = index[:, rank] == expert
                total[chosen] += weights[chosen, rank, None] * ffn(numbers[module], expert, hidden[chosen])
        return total

    numbers = {module: layer for layer, module in families.moe_modules(model).items()}
    ALL_EXPERTS_FUNCTIONS.register("slices_of_the_store", run)
    model.set_experts_implementation("slices_of_the_store")
    yield model
    model.set_experts_implementation("eager")


def greedy(model: PreTrainedModel) -> list[list[int]]:
    generate: Callable[..., torch.Tensor] = model.generate
    return [
        generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]


def test_greedy_tokens_are_those_of_transformers(model: PreTrainedModel, request: pytest.FixtureRequest) -> None:
    expected = greedy(model)
    assert greedy(request.getfixturevalue("slices_only")) == expected
    assert len({token for tokens in expected for token in tokens}) > 8
    assert all(token < VOCABULARY for tokens in expected for token in tokens)


class OneModule(ExpertStore):
    """The store of a single experts module with random weights, for forms that no supported family has."""

    def __new__(cls, module: nn.Module) -> "OneModule":
        store = object.__new__(cls)
        form = SliceForm(
            gated=bool(module.has_gate),
            bias=bool(module.has_bias),
            transposed=bool(module.is_transposed),
            normed=bool(module.has_post_expert_norm),
            activation=families.plain_activation(module),
        )
        object.__setattr__(store, "manifest", type("OnlyTheForm", (), {"form": form})())
        object.__setattr__(store, "module", module)
        return store

    def __init__(self, module: nn.Module) -> None:
        pass

    def slice(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        module: nn.Module = self.module  # type: ignore[attr-defined]
        params = module.named_parameters()
        return {name: p.detach()[expert] if families.is_batched(name) else p.detach() for name, p in params}


FORMS: dict[str, Callable[[], nn.Module]] = {
    "no gate": lambda: NemotronHExperts(
        NemotronHConfig(n_routed_experts=3, hidden_size=16, moe_intermediate_size=24, moe_latent_size=None)
    ),
    "a norm after the expert": lambda: MuseSparkExperts(
        MuseSparkTextConfig(num_local_experts=3, moe_hidden_size=16, moe_intermediate_size=24)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_beyond_the_families(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, shell = FORMS[form](), FORMS[form]()
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    monkeypatch.setattr("experts.ffn._experts_modules", lambda store: {0: shell.to("meta")})
    ffn = ExpertFFN(OneModule(module))
    rows = torch.randn(5, 16)
    for expert in range(3):
        assert_close(ffn(0, expert, rows), one_expert(module, expert, rows))


def mappings(file: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(file))


def test_a_slice_is_mapped_while_it_is_loaded(mixtral: ExpertStore) -> None:
    ffn, file = ExpertFFN(mixtral), mixtral.path / "experts" / "2.safetensors"
    assert ffn.loaded == frozenset()
    assert not mappings(file)
    ffn.load(0, 2)
    ffn.load(0, 2)
    assert ffn.loaded == frozenset({(0, 2)})
    one, held = mappings(file), ffn.resident_bytes
    assert one
    ffn.load(1, 2)
    assert mappings(file) == 2 * one
    assert ffn.resident_bytes == 2 * held
    ffn(0, 2, torch.ones(3, 32))
    ffn.unload([(0, 2)])
    ffn.unload([(0, 2)])
    assert ffn.loaded == frozenset({(1, 2)})
    assert mappings(file) == one
    ffn.unload(ffn.loaded)
    assert not mappings(file)
    assert ffn.resident_bytes == 0


def test_loaded_weights_are_pages_of_the_file_and_not_copies(mixtral: ExpertStore) -> None:
    ffn = ExpertFFN(mixtral)
    for layer in mixtral.manifest.moe_layers:
        ffn.load(layer, 1)
    file = str(mixtral.path / "experts" / "1.safetensors")
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if file in line]
    for weights in ffn._slices.values():
        for matrix in (weights.up, weights.down):
            assert isinstance(matrix, PlainMatrix)
            assert any(int(start, 16) <= matrix.weight.data_ptr() < int(end, 16) for start, end in ranges)


def test_bfloat16_rows_stay_close_to_transformers(tmp_path: Path) -> None:
    checkpoint = write_checkpoint("gpt_oss", tmp_path / "c", dtype=torch.bfloat16)
    store = prepare(checkpoint, tmp_path / "s")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    rows = torch.randn(4, 32).to(torch.bfloat16)
    for layer, module in families.moe_modules(model).items():
        assert_close(ExpertFFN(store)(layer, 1, rows), one_expert(module, 1, rows), tolerance=0.02)


def test_a_slice_that_is_needed_is_loaded(mixtral: ExpertStore) -> None:
    ffn = ExpertFFN(mixtral)
    ffn(0, 3, torch.ones(1, 32))
    assert ffn.loaded == frozenset({(0, 3)})


def test_wrong_calls_are_refused(mixtral: ExpertStore) -> None:
    ffn, rows = ExpertFFN(mixtral), torch.ones(2, 32)
    with pytest.raises(LookupError, match=r"layer 9 of .* has no experts"):
        ffn(9, 0, rows)
    with pytest.raises(StoreError, match="has experts 0 to 3, not 4"):
        ffn(0, 4, rows)
    with pytest.raises(ValueError, match="do not add up to 2 rows"):
        ffn.compute(0, [(0, 1)], rows, torch.empty_like(rows))
    ffn.compute(0, [], rows[:0], torch.empty_like(rows[:0]))


def test_rows_in_memory_that_torch_does_not_own(mixtral: ExpertStore) -> None:
    """As a replica is called: rows and results lie in memory shared with the gateway."""
    buffer = (ctypes.c_float * (2 * 3 * 32))()
    shared: Any = torch.frombuffer(buffer, dtype=torch.float32).view(2, 3, 32)
    shared[0] = torch.randn(3, 32)
    ffn = ExpertFFN(mixtral)
    ffn.compute(1, [(0, 1), (2, 2)], shared[0], shared[1])
    assert_close(shared[1], torch.cat([ffn(1, 0, shared[0, :1]), ffn(1, 2, shared[0, 1:])]))


def test_a_common_slice_does_without_transformers(mixtral: ExpertStore) -> None:
    program = f"""
import sys, pathlib, torch
from experts.store import ExpertStore
from experts.ffn import ExpertFFN
from experts.matrix import PlainMatrix
ExpertFFN(ExpertStore.open(pathlib.Path({str(mixtral.path)!r})))(0, 1, torch.ones(1, 32))
sys.exit("transformers" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_slice_on_a_gpu(store: ExpertStore) -> None:
    here, there = ExpertFFN(store), ExpertFFN(store, "cuda")
    rows = torch.randn(5, store.manifest.hidden_size)
    for layer in store.manifest.moe_layers:
        assert_close(there(layer, 1, rows), here(layer, 1, rows), tolerance=1e-4)  # rows on the host are carried over
        assert_close(there(layer, 1, rows.cuda()).cpu(), here(layer, 1, rows), tolerance=1e-4)
    held = torch.cuda.memory_allocated()
    there.unload(there.loaded)
    assert torch.cuda.memory_allocated() < held


def resident(file: Path) -> int:
    """Bytes of `file` that this process has mapped and that are there."""
    total, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            mine = line.endswith(str(file))
        elif mine and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> ExpertStore:
    """Slices of many pages."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_local_experts=2,
        num_attention_heads=4, num_key_value_heads=2, dtype="float32",
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "checkpoint")
    return prepare(folder / "checkpoint", folder / "store")


def test_what_is_said_to_be_resident_is(wide: ExpertStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ffn, file = ExpertFFN(wide, fast=True), wide.path / "experts" / "1.safetensors"
    monkeypatch.setattr("experts.ffn._product", lambda weight, bias, transposed, fast: PlainMatrix(weight, bias))
    for layers in (1, 2, 3):
        ffn.load(layers - 1, 1)
        assert ffn.resident_bytes == layers * 4 * 3 * 256 * 512
        assert abs(resident(file) - ffn.resident_bytes) <= layers * 2 * 4096
    ffn.unload([(0, 1), (2, 1)])
    assert abs(resident(file) - ffn.resident_bytes) <= 2 * 4096
    ffn.unload([(1, 1)])
    assert resident(file) == ffn.resident_bytes == 0


def test_a_packed_slice_leaves_no_pages_of_its_file_and_gives_its_copy_back(wide: ExpertStore) -> None:
    ffn, file = ExpertFFN(wide, fast=True), wide.path / "experts" / "0.safetensors"
    process = psutil.Process()
    before = process.memory_info().rss
    for layer in range(3):
        ffn.load(layer, 0)
    held = ffn.resident_bytes
    assert held == 3 * 4 * 3 * 256 * 512
    assert resident(file) < held / 4
    ffn.unload(ffn.loaded)
    assert process.memory_info().rss < before + held / 2


def test_slices_come_and_go_while_others_compute(wide: ExpertStore) -> None:
    ffn, rows = ExpertFFN(wide, fast=True), torch.randn(4, 256)
    expected = {(layer, expert): ffn(layer, expert, rows) for layer, expert in wide.slices}
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            ffn.unload(ffn.loaded)
            ffn.load(1, 0)

    churning = threading.Thread(target=churn)
    churning.start()
    try:
        for layer, expert in wide.slices * 20:
            assert torch.equal(ffn(layer, expert, rows), expected[layer, expert])
    finally:
        stop.set()
        churning.join()
