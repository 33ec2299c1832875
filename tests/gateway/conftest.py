"""The compiled kernel, made once a session, for those tests that ask for it; all others run without."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import paged_decode
from gateway.native_code import NoCompilerError


@pytest.fixture(scope="session")
def compiled_folder() -> Iterator[Path]:
    """A folder with the kernel, where compiled layers may be put too."""
    folder = Path(tempfile.mkdtemp(prefix="evermoe-"))
    try:
        paged_decode.build(folder)
        yield folder
    except NoCompilerError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def kernel(compiled_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel is loaded meanwhile; the folder it is in."""
    monkeypatch.setattr(paged_decode, "_kernel", None)
    assert paged_decode.load(compiled_folder)
    return compiled_folder
