"""The compiled kernel is plain softmax attention of one row of each sequence over its own blocks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts import native_code
from gateway import paged_decode

pytestmark = pytest.mark.usefixtures("kernel")

ROOT = Path(__file__).parents[2]
INFINITE = float("inf")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
VECTOR = 16  # the widest: scores are padded to whole vectors of 8 or 16


@dataclass
class Case:
    """What the kernel is asked."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    scaling: float = 0.2

    def run(self) -> torch.Tensor:
        return paged_decode.paged_decode(
            self.query, self.keys, self.values, self.tables, self.lengths, self.scaling, self.mask, self.sinks
        )

    def expected(self) -> torch.Tensor:
        """[B, Hq, Dv] in float64, sequence by sequence and head by head."""
        heads, sequences = self.query.shape[:2]
        out = torch.empty(sequences, heads, self.values.shape[-1], dtype=torch.float64)
        for b in range(sequences):
            length = int(self.lengths[b])
            for h in range(heads):
                key_head = h // (heads // self.keys.shape[0])
                keys = self.keys[key_head, self.tables[b]].flatten(0, 1)[:length].double()
                values = self.values[key_head, self.tables[b]].flatten(0, 1)[:length].double()
                scores = keys @ self.query[h, b].double() * self.scaling
                if self.mask is not None:
                    scores = scores + self.mask[b, :length].double()
                if self.sinks is not None:  # one more score, without a value
                    scores = torch.cat([scores, self.sinks[h : h + 1].double()])
                out[b, h] = scores.softmax(0)[:length] @ values
        return out

    def check(self) -> None:
        got, expected = self.run(), self.expected()
        assert got.shape == expected.shape
        assert got.dtype == self.query.dtype
        assert got.isfinite().all()
        assert ((got.double() - expected).abs() <= TOLERANCE[got.dtype] * expected.abs().max().clamp(min=1)).all()


def case(
    *,
    lengths: list[int],
    dtype: torch.dtype = torch.float32,
    key_heads: int = 2,
    group: int = 2,
    key_dim: int = 32,
    value_dim: int = 32,
    block_size: int = 4,
    in_keys: bool = False,
    seed: int = 0,
) -> Case:
    """Sequences of these lengths in blocks scattered over the pool; whatever isn't theirs is not a number."""
    random = torch.Generator().manual_seed(seed)
    width = -(-max(lengths) // block_size)
    blocks = width * len(lengths) + 3
    order = torch.randperm(blocks, generator=random)[: width * len(lengths)].view(len(lengths), width)
    pools = [
        torch.full((key_heads, blocks, block_size, dim), float("nan"), dtype=dtype) for dim in (key_dim, value_dim)
    ]
    for table, length in zip(order, lengths, strict=True):
        for position in range(length):
            for pool in pools:
                row = torch.randn(key_heads, pool.shape[-1], generator=random).to(dtype)
                pool[:, table[position // block_size], position % block_size] = row
    tables = order.clone()
    for number, length in enumerate(lengths):
        used = -(-length // block_size)
        tables[number, used:] = order[number, 0]
    return Case(
        query=torch.randn(key_heads * group, len(lengths), key_dim, generator=random).to(dtype),
        keys=pools[0],
        values=pools[0] if in_keys else pools[1],
        tables=tables,
        lengths=torch.tensor(lengths),
    )


def random_mask(lengths: list[int], seed: int) -> torch.Tensor:
    """0, -inf and other numbers; never -inf for all that a row sees."""
    random = torch.Generator().manual_seed(seed)
    mask = torch.zeros(len(lengths), max(lengths))
    mask[torch.rand(mask.shape, generator=random) < 0.2] = 1.5
    mask[torch.rand(mask.shape, generator=random) < 0.6] = -INFINITE
    for row, length in enumerate(lengths):
        mask[row, int(torch.randint(length, (1,), generator=random))] = 0.0
    return mask


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    dtype=st.sampled_from(list(TOLERANCE)),
    key_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 5, 8]),
    key_dim=st.sampled_from([16, 32, 48, 64, 80, 112, 128, 192, 256]),
    value_dim=st.sampled_from([16, 32, 48, 64, 80, 128, 176, 256]),
    block_size=st.sampled_from([1, 3, 4, 16]),
    in_keys=st.booleans(),
    masked=st.booleans(),
    sinks=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_equals_softmax_attention(
    lengths: list[int], dtype: torch.dtype, key_heads: int, group: int, key_dim: int, value_dim: int, block_size: int,
    in_keys: bool, masked: bool, sinks: bool, seed: int,
) -> None:  # fmt: skip
    one = case(
        lengths=lengths, dtype=dtype, key_heads=key_heads, group=group, key_dim=key_dim, value_dim=value_dim,
        block_size=block_size, in_keys=in_keys, seed=seed,
    )  # fmt: skip
    one.scaling = key_dim**-0.5
    one.mask = random_mask(lengths, seed) if masked else None
    one.sinks = torch.randn(key_heads * group) if sinks else None
    one.check()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("key_dim", range(16, 272, 16))
def test_every_head_dimension(dtype: torch.dtype, key_dim: int) -> None:
    case(lengths=[9, 1], dtype=dtype, key_dim=key_dim, value_dim=272 - key_dim).check()


@pytest.mark.parametrize("length", [*range(1, 2 * VECTOR + 2), 63, 64, 65])
@pytest.mark.parametrize("sinks", [None, torch.zeros(4), torch.full((4,), -INFINITE), torch.full((4,), 30.0)])
def test_scores_padded_to_whole_vectors_add_nothing(length: int, sinks: torch.Tensor | None) -> None:
    one = case(lengths=[length], group=2)
    one.query.fill_(-3.0)  # scores far below zero, so that a padding of zeros would win
    one.keys.abs_()
    one.sinks = sinks
    one.check()


@pytest.mark.parametrize("length", [1, 4, 15, 16, 17, 31, 32, 33])
def test_scores_are_shares_of_one(length: int) -> None:
    one = case(lengths=[length])
    one.values.nan_to_num_(0.0)
    one.values[one.values != 0] = 1.0
    torch.testing.assert_close(one.run(), torch.ones(1, 4, 32))


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
def test_lengths_at_the_edges_of_blocks(block_size: int, blocks: int) -> None:
    edge = block_size * blocks
    case(lengths=[length for length in (edge - 1, edge, edge + 1) if length], block_size=block_size).check()
    case(lengths=[edge], block_size=block_size).check()  # the table is just as long as the sequence


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [7, 16, 40])
def test_of_all_masked_but_one_only_that_one_counts(dtype: torch.dtype, length: int) -> None:
    for seen in range(length):
        one = case(lengths=[length], dtype=dtype)
        one.mask = torch.full((1, length), -INFINITE)
        one.mask[0, seen] = 0.0
        block, place = one.tables[0, seen // 4], seen % 4
        expected = one.values[:, block, place].repeat_interleave(2, 0)
        torch.testing.assert_close(one.run()[0], expected)


def test_masked_tokens_count_nothing_however_large_their_values() -> None:
    one = case(lengths=[20])
    one.mask = torch.zeros(1, 20)
    one.mask[0, 3:9] = -INFINITE
    expected = one.run()
    for position in range(3, 9):
        one.values[:, one.tables[0, position // 4], position % 4] = 1e30
        one.keys[:, one.tables[0, position // 4], position % 4] = 1e10
    torch.testing.assert_close(one.run(), expected)


def test_with_everything_masked_only_the_sink_is_left() -> None:
    one = case(lengths=[5])
    one.mask, one.sinks = torch.full((1, 5), -INFINITE), torch.zeros(4)
    assert (one.run() == 0).all()


def test_a_mask_may_be_wider_than_the_longest_sequence() -> None:
    one = case(lengths=[5, 9])
    one.mask = torch.nn.functional.pad(random_mask([5, 9], 0), (0, 7), value=float("nan"))
    one.check()


@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0, 1e4])
def test_large_scores_neither_overflow_nor_vanish(size: float) -> None:
    one = case(lengths=[33, 17])
    one.query *= size
    one.check()


def test_queries_may_lie_in_any_order_but_their_own_rows() -> None:
    one = case(lengths=[5, 9, 2], group=4)
    plain = one.run()
    by_row = one.query.transpose(0, 1).contiguous().transpose(0, 1)
    inside = torch.randn(8, 7, 96)[:, 2:5, 32:64].copy_(one.query)
    for query in (by_row, inside):
        assert not query.is_contiguous()
        one.query = query
        assert torch.equal(one.run(), plain)


def test_one_row_may_stand_for_all_heads() -> None:
    one = case(lengths=[5, 9])
    one.query = one.query[:1].expand(4, 2, 32)
    one.check()


def test_answers_do_not_depend_on_the_number_of_threads() -> None:
    one, threads = case(lengths=[900, 31, 200, 64, 1], block_size=16), torch.get_num_threads()
    alone = one.run()
    try:
        torch.set_num_threads(4)
        assert torch.equal(one.run(), alone)
    finally:
        torch.set_num_threads(threads)
    one.check()


def test_what_it_cannot_take_is_refused() -> None:
    one = case(lengths=[5])
    with pytest.raises(RuntimeError):
        Case(**{**vars(one), "lengths": torch.tensor([9])}).run()  # longer than its table
    with pytest.raises(RuntimeError):
        Case(**{**vars(one), "query": torch.randn(4, 1, 64)[..., ::2]}).run()
    with pytest.raises(RuntimeError):
        Case(**{**vars(one), "mask": torch.zeros(1, 4)}).run()
    double = {name: getattr(one, name).double() for name in ("query", "keys", "values")}
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16"):
        Case(**{**vars(one), **double}).run()


def test_takes_what_it_can_attend_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def pool(dim: int, device: str = "cpu") -> torch.Tensor:
        return torch.empty(1, 1, 4, dim, device=device)

    assert paged_decode.takes(pool(48), pool(16))
    assert not paged_decode.takes(pool(24), pool(16))
    assert not paged_decode.takes(pool(16), pool(24))
    assert not paged_decode.takes(pool(16, "meta"), pool(16, "meta"))
    monkeypatch.setattr(paged_decode, "_kernel", None)
    assert not paged_decode.takes(pool(48), pool(16))


def test_without_a_file_nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_decode, "_kernel", None)
    assert not paged_decode.load(tmp_path)
    assert not paged_decode.loaded()


def test_a_damaged_file_is_not_loaded_and_harms_nothing(tmp_path: Path) -> None:
    paged_decode.library(tmp_path).write_bytes(b"not a library")
    program = f"""
import pathlib
from gateway import paged_decode
assert not paged_decode.load(pathlib.Path({str(tmp_path)!r}))
assert not paged_decode.loaded()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    [warning] = done.stderr.splitlines()
    assert "without the compiled kernel" in warning


def test_a_kernel_for_another_machine_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = paged_decode.library(tmp_path)
    monkeypatch.setattr(native_code, "made_for", lambda: "another processor")
    assert paged_decode.library(tmp_path) != here


def test_what_is_built_is_not_built_again(compiled_folder: Path) -> None:
    file = paged_decode.library(compiled_folder)
    before = file.stat().st_mtime_ns
    paged_decode.build(compiled_folder)
    assert file.stat().st_mtime_ns == before
    assert [path.name for path in compiled_folder.glob("paged_decode*")] == [file.name]


def test_without_a_compiler_there_is_one_sentence(tmp_path: Path) -> None:
    from torch._inductor import config

    with (
        config.patch({"cpp.cxx": "no-such-compiler"}),
        pytest.raises(native_code.NoCompilerError, match=r"no C\+\+ compiler here; install"),
    ):
        paged_decode.build(tmp_path)
    assert not list(tmp_path.iterdir())
