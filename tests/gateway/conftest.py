"""The compiled kernel of attention, for those tests that ask for it; all others run without."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway import paged_decode


@pytest.fixture
def kernel(compiled_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel is loaded meanwhile; the folder it is in."""
    monkeypatch.setattr(paged_decode, "_kernel", None)
    assert paged_decode.load(compiled_folder)
    return compiled_folder
