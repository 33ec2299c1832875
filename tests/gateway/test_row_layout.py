"""Rows laid out for those who compute them: the compiled way and the other do the same."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts import kernels
from gateway.assignment import Holders, assign
from gateway.row_layout import lay_out

EXPERTS, WIDTH = 6, 5

NOBODY: Holders[str] = Holders.of([])


@pytest.fixture(params=["compiled", "python"], autouse=True)
def way(request: pytest.FixtureRequest, compiled_folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernels, "_loaded", False)
    if request.param == "compiled":
        assert kernels.load(compiled_folder)
    return str(request.param)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    tokens=st.integers(1, 40),
    top_k=st.integers(1, EXPERTS),
    replicas=st.integers(0, 3),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_each_part_has_its_experts_rows_side_by_side(
    tokens: int, top_k: int, replicas: int, seed: int, dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=random).to(dtype)
    index = torch.rand(tokens, EXPERTS, generator=random).topk(top_k).indices
    counts = torch.bincount(index.flatten(), minlength=EXPERTS).tolist()
    remote, inline = assign(counts, lambda expert: Holders.evenly("abc"[: replicas if expert % 2 else 0]), 2, seed)
    parts = [part for _, theirs in remote for part in theirs] + inline
    out = torch.full((index.numel(), WIDTH), float("nan"), dtype=dtype)
    places = lay_out(hidden, index, parts, out)
    assert torch.equal(out[places], hidden.repeat_interleave(top_k, 0))
    laid = torch.tensor([part.expert for part in parts for _ in range(part.rows)])
    assert torch.equal(laid[places], index.flatten())
    starts = [part.start + i for part in parts for i in range(part.rows)]  # sorted by expert, in order of the rows
    order = index.flatten().argsort(stable=True)
    assert torch.equal(order[torch.tensor(starts)][places], torch.arange(index.numel()))


def test_rows_that_are_no_block_are_read_too() -> None:
    hidden = torch.randn(WIDTH, 3).t()
    out = torch.empty(3, WIDTH)
    _, inline = assign([1, 1, 1], lambda expert: NOBODY, 1, 0)
    places = lay_out(hidden, torch.tensor([[2], [0], [1]]), inline, out)
    assert torch.equal(out[places], hidden)


def test_parts_that_do_not_cover_the_rows_are_refused(way: str) -> None:
    if way != "compiled":
        pytest.skip("only compiled code could write where it must not")
    hidden, out = torch.randn(2, WIDTH), torch.empty(2, WIDTH)
    index = torch.tensor([[0], [1]])
    _, parts = assign([1, 1], lambda expert: NOBODY, 1, 0)
    for wrong in (parts[:1], [*parts, parts[0]], [parts[0], parts[0]], [parts[0], parts[1]._replace(start=2)]):
        with pytest.raises((RuntimeError, IndexError)):
            lay_out(hidden, index, wrong, out)
