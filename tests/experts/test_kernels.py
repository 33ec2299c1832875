"""The compiled kernels give what plain torch gives: a layer's experts, and the sum over top-k."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from experts import kernels
from experts.ffn import ExpertFFN
from experts.matrix import FastMatrix
from experts.store import prepare
from tests.checkpoints import write_checkpoint

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def built(compiled_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_loaded", False)
    assert kernels.load(compiled_folder)
    if not torch.ops.evermoe.multiplies(torch.bfloat16):
        pytest.skip("this processor has no bfloat16 products")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", [[1], [1, 1], [3, 1, 40], [0, 2], [200]])
def test_experts_equal_plain_torch(dtype: torch.dtype, counts: list[int]) -> None:
    torch.manual_seed(0)
    hidden, inner = 64, 96
    ups = [torch.randn(2 * inner, hidden).to(dtype) * 0.1 for _ in counts]
    downs = [torch.randn(hidden, inner).to(dtype) * 0.1 for _ in counts]
    rows = torch.randn(sum(counts), hidden).to(dtype)
    out = torch.full_like(rows, float("nan"))
    kernels.expert_ffn(rows, counts, ups, downs, out)
    expected = []
    for part, up, down in zip(torch.split(rows, counts), ups, downs, strict=True):
        gate, value = F.linear(part, up).chunk(2, dim=-1)
        expected.append(F.linear(F.silu(gate) * value, down))
    torch.testing.assert_close(out, torch.cat(expected), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_one_row_for_all_experts_is_read_where_it_is() -> None:
    up, down = torch.randn(64, 32), torch.randn(32, 32)
    row, out = torch.randn(1, 32), torch.empty(2, 32)
    kernels.expert_ffn(row.expand(2, -1), [1, 1], [up, up], [down, down], out)
    alone = torch.empty(1, 32)
    kernels.expert_ffn(row, [1], [up], [down], alone)
    assert torch.equal(out, alone.expand(2, -1))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 1, 32), (1, 2, 64), (7, 3, 96), (600, 2, 64)])
def test_the_sum_over_top_k_is_in_fp32(dtype: torch.dtype, tokens: int, top_k: int, width: int) -> None:
    torch.manual_seed(0)
    rows, weights = torch.randn(tokens * top_k, width).to(dtype), torch.rand(tokens, top_k)
    place = torch.randperm(tokens * top_k)
    expected = (rows[place].view(tokens, top_k, width).float() * weights[..., None]).sum(1)
    got = kernels.weighted_sum(rows, place, weights)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_stores_experts_give_the_same_with_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    store = prepare(write_checkpoint("mixtral", tmp_path / "checkpoint", dtype=dtype), tmp_path / "store")
    fast, rows = ExpertFFN(store, fast=True), torch.randn(5, store.manifest.hidden_size).to(dtype)
    used = fast._fuses(fast._slice(0, 1), rows)
    assert used == (store.manifest.hidden_size % 32 == 0 and store.manifest.expert_params["down_proj"][-1] % 32 == 0)
    with_kernel = fast(0, 1, rows)
    monkeypatch.setattr(kernels, "_loaded", False)
    torch.testing.assert_close(with_kernel, fast(0, 1, rows), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 2, 9, 70])
def test_a_whole_layer_in_one_call_equals_its_steps(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(0)
    experts, top_k, hidden, inner = 6, 2, 64, 32
    ups = [torch.randn(2 * inner, hidden).to(dtype) * 0.1 for _ in range(experts)]
    downs = [torch.randn(hidden, inner).to(dtype) * 0.1 for _ in range(experts)]
    rows, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, top_k)
    index = torch.rand(tokens, experts - 1).topk(top_k).indices.contiguous()  # expert 5 has no rows
    choice = index.flatten()
    order = choice.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    active, counts = torch.unique(choice, return_counts=True)
    results = torch.empty(len(order), hidden, dtype=dtype)
    kernels.expert_ffn(
        rows[order // top_k], counts.tolist(), [ups[e] for e in active], [downs[e] for e in active], results
    )
    assert torch.equal(kernels.mixture(rows, index, weights, ups, downs), kernels.weighted_sum(results, place, weights))


def test_a_whole_layer_refuses_experts_that_are_not_there() -> None:
    weights = [torch.zeros(64, 32)], [torch.zeros(32, 32)]
    with pytest.raises(IndexError, match="there is no expert 1"):
        kernels.mixture(torch.zeros(1, 32), torch.tensor([[1]]), torch.ones(1, 1), *weights)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1,), (5,), (6,), (7,), (2, 9), (130,)])
def test_a_product_equals_linear(dtype: torch.dtype, bias: bool, rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight, added = torch.randn(160, 96).to(dtype), torch.randn(160).to(dtype) if bias else None
    x = torch.randn(*rows, 96).to(dtype)
    got = kernels.product(x, weight, added)
    torch.testing.assert_close(got, F.linear(x, weight, added), rtol=TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])


def test_a_matrix_uses_the_kernel_and_lets_go_of_its_packed_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(64, 32), torch.randn(3, 32)
    monkeypatch.setattr(kernels, "_loaded", False)
    matrix = FastMatrix(weight)
    assert matrix._packed is not None
    before = matrix(x)
    monkeypatch.setattr(kernels, "_loaded", True)
    torch.testing.assert_close(matrix(x), before)
    assert matrix._packed is None


def test_results_do_not_depend_on_who_else_is_in_the_batch() -> None:
    weight, x = torch.randn(64, 32), torch.randn(40, 32)
    together = kernels.product(x, weight, None)
    assert all(torch.equal(kernels.product(x[i : i + 1], weight, None)[0], together[i]) for i in range(len(x)))


def test_what_does_not_fill_vectors_is_left_to_torch() -> None:
    assert kernels.multiplies(torch.empty(64, 96))
    assert not kernels.multiplies(torch.empty(64, 100))
    assert not kernels.multiplies(torch.empty(48, 96))
    assert not kernels.multiplies(torch.empty(96, 64).t())
    assert not kernels.multiplies(torch.empty(64, 96, dtype=torch.float16))
    assert not kernels.multiplies(torch.empty(64, 96, device="meta"))


def test_many_threads_may_call_at_once() -> None:
    weight, rows = torch.randn(4096, 256), [torch.randn(3, 256) for _ in range(8)]
    expected = [F.linear(x, weight) for x in rows]

    def often(index: int) -> list[torch.Tensor]:
        return [kernels.product(rows[index], weight, None) for _ in range(50)]

    kernels.share(3)
    with ThreadPoolExecutor(8) as threads:
        for index, results in enumerate(threads.map(often, range(8))):
            for got in results:
                torch.testing.assert_close(got, expected[index], rtol=1e-4, atol=1e-4)
