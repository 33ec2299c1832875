"""Files written piece by piece are what the safetensors library expects, also when the writing was interrupted."""

import hashlib
import string
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from experts.checkpoint import DTYPES
from experts.safetensors_writer import SafetensorsWriter, TensorSpec, encode_header

Tensors = list[tuple[str, torch.Tensor]]


@st.composite
def tensors(draw: st.DrawFn) -> Tensors:
    """Up to six tensors of any dtype and shape, empty and zero-dimensional ones too, wider dtypes first."""
    names = draw(
        st.lists(st.text(string.ascii_letters + string.digits + '._ é"\\', min_size=1), unique=True, max_size=6)
    )
    made = []
    for name in names:
        dtype = draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        values = torch.randint(0, 2 if dtype is torch.bool else 100, shape)
        made.append((name, values.to(dtype)))
    return sorted(made, key=lambda item: -item[1].dtype.itemsize)


def specs(given: Tensors) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in given]


def assert_holds(path: Path, expected: Tensors) -> None:
    loaded = load_file(path)
    assert loaded.keys() == dict(expected).keys()
    for name, tensor in expected:
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name


@settings(max_examples=60, deadline=None)
@given(tensors(), st.data())
def test_the_library_reads_what_was_written_and_continued(given: Tensors, data: st.DataObject) -> None:
    stop = data.draw(st.integers(0, len(given)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        first = SafetensorsWriter(path, specs(given))
        first.start()
        for name, tensor in given[:stop]:
            first.append(name, tensor)
        done, checksum = first.count, first.sha256
        for name, tensor in given[stop : stop + 1]:
            first.append(name, tensor)  # written, but not in the record from which the second run starts

        second = SafetensorsWriter(path, specs(given))
        assert second.resume(done, checksum)
        for name, tensor in given[stop:]:
            second.append(name, tensor)

        assert_holds(path, given)
        content = path.read_bytes()
        assert (second.size, second.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert second.total == len(content)


def test_tensors_are_cast_and_laid_out_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.safetensors_writer._PIECE", 64)
    source = torch.randn(7, 33)
    writer = SafetensorsWriter(tmp_path / "x.safetensors", [TensorSpec("a", torch.bfloat16, (33, 7))])
    writer.start()
    writer.append("a", source.t())
    assert_holds(writer.path, [("a", source.t().to(torch.bfloat16))])


def test_the_first_tensor_begins_at_a_cache_line() -> None:
    assert len(encode_header([TensorSpec("a", torch.float32, (3,))])) % 64 == 0


def test_an_order_that_would_leave_a_tensor_unaligned_is_refused() -> None:
    with pytest.raises(ValueError, match="not be aligned"):
        encode_header([TensorSpec("a", torch.bfloat16, (1,)), TensorSpec("b", torch.float32, (1,))])


def test_only_the_next_tensor_in_its_own_shape_is_accepted(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x.safetensors", [TensorSpec("a", torch.float32, (2,))])
    writer.start()
    for name, tensor in (("b", torch.zeros(2)), ("a", torch.zeros(3))):
        with pytest.raises(ValueError, match="expected"):
            writer.append(name, tensor)


def test_a_changed_or_shortened_file_is_not_continued(tmp_path: Path) -> None:
    given = [("a", torch.arange(8.0)), ("b", torch.ones(8))]
    writer = SafetensorsWriter(tmp_path / "x.safetensors", specs(given))
    writer.start()
    writer.append(*given[0])
    content = bytearray(writer.path.read_bytes())
    for wrong in (content[:-1], content[:-1] + b"?", b""):
        writer.path.write_bytes(wrong)
        assert not SafetensorsWriter(writer.path, specs(given)).resume(1, writer.sha256)
        assert writer.path.read_bytes() == wrong
    writer.path.unlink()
    assert not SafetensorsWriter(writer.path, specs(given)).resume(1, writer.sha256)
