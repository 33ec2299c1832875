"""The compiled kernels give what plain torch gives: a layer's experts, and the sum over top-k."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from experts import expert_ffn
from experts.ffn import ExpertFFN
from experts.matrix import PackedMatrix
from experts.store import prepare
from tests.checkpoints import write_checkpoint

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture
def kernels(compiled_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(expert_ffn, "_loaded", False)
    assert expert_ffn.load(compiled_folder)
    return compiled_folder


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", [[1], [1, 1], [3, 1, 40], [0, 2], [200]])
def test_experts_equal_plain_torch(kernels: Path, dtype: torch.dtype, counts: list[int]) -> None:
    torch.manual_seed(0)
    hidden, inner = 64, 96
    ups = [torch.randn(2 * inner, hidden).to(dtype) * 0.1 for _ in counts]
    downs = [torch.randn(hidden, inner).to(dtype) * 0.1 for _ in counts]
    rows = torch.randn(sum(counts), hidden).to(dtype)
    out = torch.full_like(rows, float("nan"))
    expert_ffn.expert_ffn(rows, counts, list(map(PackedMatrix, ups)), list(map(PackedMatrix, downs)), out)
    expected = []
    for part, up, down in zip(torch.split(rows, counts), ups, downs, strict=True):
        gate, value = F.linear(part, up).chunk(2, dim=-1)
        expected.append(F.linear(F.silu(gate) * value, down))
    torch.testing.assert_close(out, torch.cat(expected), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_one_row_for_all_experts_is_read_where_it_is(kernels: Path) -> None:
    up, down = PackedMatrix(torch.randn(64, 32)), PackedMatrix(torch.randn(32, 32))
    row, out = torch.randn(1, 32), torch.empty(2, 32)
    expert_ffn.expert_ffn(row.expand(2, -1), [1, 1], [up, up], [down, down], out)
    alone = torch.empty(1, 32)
    expert_ffn.expert_ffn(row, [1], [up], [down], alone)
    assert torch.equal(out, alone.expand(2, -1))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 1, 32), (1, 2, 64), (7, 3, 96), (600, 2, 64)])
def test_the_sum_over_top_k_is_in_fp32(kernels: Path, dtype: torch.dtype, tokens: int, top_k: int, width: int) -> None:
    torch.manual_seed(0)
    rows, weights = torch.randn(tokens * top_k, width).to(dtype), torch.rand(tokens, top_k)
    place = torch.randperm(tokens * top_k)
    expected = (rows[place].view(tokens, top_k, width).float() * weights[..., None]).sum(1)
    got = expert_ffn.weighted_sum(rows, place, weights)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_stores_experts_give_the_same_with_and_without(
    kernels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    store = prepare(write_checkpoint("mixtral", tmp_path / "checkpoint", dtype=dtype), tmp_path / "store")
    packed, rows = ExpertFFN(store, packed=True), torch.randn(5, store.manifest.hidden_size).to(dtype)
    used = packed._fuses(packed._slice(0, 1), rows)
    assert used == (store.manifest.hidden_size % 32 == 0 and store.manifest.expert_params["down_proj"][-1] % 32 == 0)
    with_kernel = packed(0, 1, rows)
    monkeypatch.setattr(expert_ffn, "_loaded", False)
    torch.testing.assert_close(with_kernel, packed(0, 1, rows), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_widths_that_do_not_fill_vectors_are_left_to_torch(kernels: Path) -> None:
    assert expert_ffn.takes(torch.empty(1, 64), 96)
    assert not expert_ffn.takes(torch.empty(1, 48), 96)
    assert not expert_ffn.takes(torch.empty(1, 64), 100)
    assert not expert_ffn.takes(torch.empty(1, 64, dtype=torch.float16), 96)
    assert not expert_ffn.takes(torch.empty(1, 64, device="meta"), 96)
