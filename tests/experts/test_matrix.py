"""A packed matrix gives the numbers of a plain one; what oneDNN has no layout for is not packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from experts.ffn import ExpertFFN
from experts.matrix import FastMatrix, PlainMatrix, packable
from experts.store import prepare
from tests.checkpoints import FAMILIES, write_checkpoint

HAS_BF16 = packable(torch.ones(1, 1, dtype=torch.bfloat16))

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}

needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this processor has no bfloat16 products in oneDNN")
either_dtype = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_same(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Alike up to the rounding of `expected`'s dtype."""
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    scale = expected.abs().max() if expected.numel() else 1.0
    assert ((result - expected).abs() <= TOLERANCE[expected.dtype] * scale).all()


@given(
    rows=st.integers(0, 40),
    inner=st.integers(1, 70),
    out=st.integers(1, 70),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, *([torch.bfloat16] if HAS_BF16 else [])]),
)
@settings(max_examples=80, deadline=None)
def test_packed_equals_linear(rows: int, inner: int, out: int, bias: bool, dtype: torch.dtype) -> None:
    x, weight = random(rows, inner, dtype=dtype), random(out, inner, dtype=dtype)
    added = random(out, dtype=dtype) if bias else None
    assert_same(FastMatrix(weight, added)(x), F.linear(x, weight, added))


@either_dtype
@pytest.mark.parametrize("shape", [(24,), (1, 5, 24), (2, 3, 24), (2, 0, 24), (0, 24)])
def test_rows_of_any_number_of_dimensions(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight, bias = random(*shape, dtype=dtype), random(7, 24, dtype=dtype), random(7, dtype=dtype)
    assert_same(FastMatrix(weight, bias)(x), F.linear(x, weight, bias))


def _strided(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    wide = random(12, 48, dtype=dtype)
    return {
        "one row expanded": random(1, 24, dtype=dtype).expand(6, 24),
        "half of a wider row": wide[:, 24:],
        "every third row": wide[::3, :24],
        "every second number": wide[:, ::2],
        "transposed": random(24, 6, dtype=dtype).t(),
        "behind an odd offset": random(1 + 3 * 24, dtype=dtype)[1:].view(3, 24),
    }


@either_dtype
@pytest.mark.parametrize("kind", _strided(torch.float32))
def test_rows_need_not_be_contiguous(dtype: torch.dtype, kind: str) -> None:
    x, weight = _strided(dtype)[kind], random(40, 24, dtype=dtype)
    assert_same(FastMatrix(weight)(x), F.linear(x, weight))


@either_dtype
def test_a_weight_that_is_a_view_is_packed_as_it_reads(dtype: torch.dtype) -> None:
    whole = random(40, 30, dtype=dtype)
    x = random(5, 16, dtype=dtype)
    for weight in (whole[3:20, 4:20], whole[::2, :16], random(16, 9, dtype=dtype).t()):
        assert_same(FastMatrix(weight)(x), F.linear(x, weight))


def test_the_packed_copy_is_its_own() -> None:
    weight = random(8, 8)
    packed, x = FastMatrix(weight), random(2, 8)
    expected = F.linear(x, weight)
    weight.zero_()
    assert_same(packed(x), expected)


def test_a_plain_matrix_is_the_weight_itself() -> None:
    weight, bias, x = random(6, 5), random(6), random(3, 5)
    matrix = PlainMatrix(weight, bias)
    assert matrix.weight is weight
    assert torch.equal(matrix(x), F.linear(x, weight, bias))


def test_both_tell_how_wide_they_are() -> None:
    assert PlainMatrix(random(6, 5)).out_features == FastMatrix(random(6, 5)).out_features == 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn])
def test_other_dtypes_are_not_packable(dtype: torch.dtype) -> None:
    assert packable(torch.zeros(4, 4))
    assert not packable(torch.zeros(4, 4, dtype=dtype))


def test_what_is_not_in_memory_is_not_packable() -> None:
    assert not packable(torch.empty(4, 4, device="meta"))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_nothing_is_not_packable(shape: tuple[int, int]) -> None:
    assert not packable(torch.empty(shape))


def test_bfloat16_is_packable_only_where_onednn_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not packable(torch.zeros(4, 4, dtype=torch.bfloat16))
    assert packable(torch.zeros(4, 4))


def test_nothing_is_packable_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not packable(torch.zeros(4, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_slices_equal_mapped_ones_in_every_family(family: str, tmp_path: Path) -> None:
    store = prepare(write_checkpoint(family, tmp_path / "checkpoint"), tmp_path / "store")
    plain, packed = ExpertFFN(store), ExpertFFN(store, fast=True)
    rows = 3 * random(9, store.manifest.hidden_size)
    for layer in store.manifest.moe_layers:
        segments = [(2, 4), (0, 0), (1, 1), (3, 4)]
        one, other = torch.empty_like(rows), torch.empty_like(rows)
        plain.compute(layer, segments, rows, one)
        packed.compute(layer, segments, rows, other)
        assert one.abs().max() > 0
        assert_same(other, one)
    assert all(
        isinstance(matrix, FastMatrix) for weights in packed._slices.values() for matrix in (weights.up, weights.down)
    )
