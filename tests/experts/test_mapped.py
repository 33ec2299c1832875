"""Pages of mapped weights are there before they are read."""

import mmap
import resource
from pathlib import Path

import pytest
import torch

from experts.mapped import populate

PAGES = 4096


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    (tmp_path / "weights").write_bytes(bytes(PAGES * mmap.PAGESIZE))
    with open(tmp_path / "weights", "r+b") as file:
        return torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)


def faults(work: torch.Tensor) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    assert not work[:: mmap.PAGESIZE].any()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_populated_pages_are_read_without_faults(mapped: torch.Tensor) -> None:
    first, second = mapped.chunk(2)
    populate(first)
    assert faults(first) < 20 < faults(second)


def test_what_has_no_pages_is_left_alone() -> None:
    populate(torch.empty(0))
    populate(torch.empty(4, 4, device="meta"))
