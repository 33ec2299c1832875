"""Routing records: load steps in a Parquet file.

One row per engine step, in order of time. Columns: ``time_s`` float64; ``prefill_rows``, ``decode_rows``, ``running``,
``waiting``, ``waiting_tokens``, ``prompt_left``, ``token_budget``, ``max_sequences`` int32; ``prefill_counts``,
``decode_counts``, ``look_ahead``: lists of layers x experts int32; for each signal (`predictor.load_step.SIGNALS`)
``rows:NAME`` float32 and ``share:NAME``, a list of layers x experts float16; ``foreseen``, such a list too. The file's
metadata has ``evermoe.records`` (this schema's version), ``evermoe.shape`` (JSON of the model's shape) and
``evermoe.signals`` (names, comma-separated).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from predictor.load_step import SIGNALS, LoadStep
from predictor.shape import ModelShape

VERSION = 3
_NUMBERS = (
    "prefill_rows",
    "decode_rows",
    "running",
    "waiting",
    "waiting_tokens",
    "prompt_left",
    "token_budget",
    "max_sequences",
)
_COUNTS = ("prefill_counts", "decode_counts", "look_ahead")
_GROUP_BYTES = 4 << 20  # of steps in memory before they are written
_GROUP_FOOTER = 16 << 10  # more than a group needs for headers and its part of the file's footer


class RecordError(ValueError):
    """A file that cannot be read as records of this model; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Records:
    """S consecutive steps of one recording, column by column; see `LoadStep` for what the columns mean."""

    shape: ModelShape
    time_s: npt.NDArray[np.float64]
    """[S], never falling"""
    prefill_rows: npt.NDArray[np.int32]
    decode_rows: npt.NDArray[np.int32]
    running: npt.NDArray[np.int32]
    waiting: npt.NDArray[np.int32]
    waiting_tokens: npt.NDArray[np.int32]
    prompt_left: npt.NDArray[np.int32]
    token_budget: npt.NDArray[np.int32]
    max_sequences: npt.NDArray[np.int32]
    prefill_counts: npt.NDArray[np.int32]
    """[S, L, E], like the next two"""
    decode_counts: npt.NDArray[np.int32]
    look_ahead: npt.NDArray[np.int32]
    signals: npt.NDArray[np.float32]
    """[S, signals, L, E]"""
    signal_rows: npt.NDArray[np.float32]
    """[S, signals]"""
    foreseen: npt.NDArray[np.float32]
    """[S, L, E]"""

    def __len__(self) -> int:
        return len(self.time_s)

    @property
    def counts(self) -> npt.NDArray[np.int32]:
        """Rows per expert of each step, [S, L, E]."""
        return self.prefill_counts + self.decode_counts


def stack(shape: ModelShape, steps: Sequence[LoadStep]) -> Records:
    """The records of `steps`, which are in order of time."""
    size = (len(steps), len(shape.layers), shape.experts)
    numbers = {name: np.array([getattr(step, name) for step in steps], np.int32) for name in _NUMBERS}
    counts = {name: np.array([getattr(step, name) for step in steps], np.int32).reshape(size) for name in _COUNTS}
    return Records(
        shape=shape,
        time_s=np.array([step.time_s for step in steps], np.float64),
        signals=np.array([step.signals for step in steps], np.float32).reshape(len(steps), len(SIGNALS), *size[1:]),
        signal_rows=np.array([step.signal_rows for step in steps], np.float32).reshape(len(steps), len(SIGNALS)),
        foreseen=np.array([step.foreseen for step in steps], np.float32).reshape(size),
        **numbers,
        **counts,
    )


class RecordWriter:
    """Writes steps to `path`, at most `max_bytes` of them; what comes after is counted in `dropped`.

    The file appears when the writer is closed, complete: until then it is `path` with ``.partial`` behind it.
    """

    def __init__(self, path: str | os.PathLike[str], shape: ModelShape, max_bytes: int = 1 << 30) -> None:
        self.path = Path(path)
        self.written = 0
        self.dropped = 0
        self._shape = shape
        self._max_bytes = max_bytes
        self._schema = _schema(shape)
        self._pending: list[LoadStep] = []
        self._groups = 0
        self._at = 0
        cells = len(shape.layers) * shape.experts
        self._step_bytes = 8 + 4 * len(_NUMBERS) + 4 * cells * len(_COUNTS) + len(SIGNALS) * (4 + 2 * cells) + 2 * cells
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file = self._partial.open("wb")
        self._writer = pq.ParquetWriter(self._file, self._schema, compression="zstd")

    @property
    def full(self) -> bool:
        """Whether `max_bytes` are used up: no step is taken any more."""
        pending = (len(self._pending) + 1) * self._step_bytes
        return self._at + pending + (self._groups + 1) * _GROUP_FOOTER > self._max_bytes

    def append(self, step: LoadStep) -> None:
        """Add a step, unless the file is full. Its arrays must not change afterwards."""
        if self.full:
            self.dropped += 1
            return
        self._pending.append(step)
        self.written += 1
        if len(self._pending) * self._step_bytes >= _GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is pending and put the file in its place."""
        if self._file.closed:
            return
        self._flush()
        self._writer.close()
        self._file.close()
        self._partial.replace(self.path)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_table(_table(stack(self._shape, self._pending), self._schema))
            self._pending = []
            self._groups += 1
            self._at = self._file.tell()


def read_records(path: str | os.PathLike[str], shape: ModelShape | None = None) -> Records:
    """The records of the file `path`; raise RecordError for what is not whole, or not of `shape` where one is given."""
    path = Path(path)
    if not path.is_file():
        raise RecordError(f"{path} is no file; records are made with `evermoe record`")
    try:
        file = pq.ParquetFile(path)
        metadata = file.schema_arrow.metadata or {}
        found = _check_metadata(path, metadata)
        table = file.read()
    except (pa.ArrowException, OSError) as error:
        raise RecordError(f"{path} is damaged or no Parquet file ({error}); record it again") from error
    if shape is not None and found != shape:
        raise RecordError(f"{path} was recorded from another model: {found}, not {shape}; record this model's traffic")
    if not table.schema.equals(_schema(found)):
        raise RecordError(f"{path} does not have the columns of routing records of version {VERSION}; record it again")
    return _checked(path, _records(found, table))


def _schema(shape: ModelShape) -> pa.Schema:
    cells = len(shape.layers) * shape.experts
    fields = [("time_s", pa.float64()), *((name, pa.int32()) for name in _NUMBERS)]
    fields += [(name, pa.list_(pa.int32(), cells)) for name in _COUNTS]
    for name in SIGNALS:
        fields += [(f"rows:{name}", pa.float32()), (f"share:{name}", pa.list_(pa.float16(), cells))]
    fields.append(("foreseen", pa.list_(pa.float16(), cells)))
    metadata = {"evermoe.records": str(VERSION), "evermoe.shape": shape.to_json(), "evermoe.signals": ",".join(SIGNALS)}
    return pa.schema(fields, metadata=metadata)


def _table(records: Records, schema: pa.Schema) -> pa.Table:
    columns: list[pa.Array] = []
    for field in schema:
        kind, _, signal = field.name.partition(":")
        if kind == "rows":
            values = records.signal_rows[:, SIGNALS.index(signal)]
        elif kind == "share":
            values = records.signals[:, SIGNALS.index(signal)].astype(np.float16)
        else:
            values = getattr(records, field.name)
            values = values.astype(np.float16) if field.name == "foreseen" else values
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        columns.append(pa.FixedSizeListArray.from_arrays(flat, type=field.type) if values.ndim > 1 else flat)
    return pa.Table.from_arrays(columns, schema=schema)


def _records(shape: ModelShape, table: pa.Table) -> Records:
    size = (len(table), len(shape.layers), shape.experts)

    def column(name: str) -> npt.NDArray[np.generic]:
        array = table[name].combine_chunks()
        lists = pa.types.is_fixed_size_list(array.type)
        values: npt.NDArray[np.generic] = (array.flatten() if lists else array).to_numpy(zero_copy_only=False)
        return values.reshape(size) if lists else values

    return Records(
        shape=shape,
        signals=np.stack([column(f"share:{name}").astype(np.float32) for name in SIGNALS], axis=1),
        signal_rows=np.stack([column(f"rows:{name}").astype(np.float32) for name in SIGNALS], axis=1),
        foreseen=column("foreseen").astype(np.float32),
        **{name: column(name) for name in ("time_s", *_NUMBERS, *_COUNTS)},  # type: ignore[arg-type]
    )


def _check_metadata(path: Path, metadata: dict[bytes, bytes]) -> ModelShape:
    version = metadata.get(b"evermoe.records")
    if version is None:
        raise RecordError(f"{path} is Parquet, but holds no routing records; make some with `evermoe record`")
    if version != str(VERSION).encode() or metadata.get(b"evermoe.signals") != ",".join(SIGNALS).encode():
        raise RecordError(f"{path} was recorded by another release (version {version.decode()!r}); record it again")
    try:
        return ModelShape.from_json(metadata[b"evermoe.shape"])
    except (KeyError, ValueError) as error:
        raise RecordError(f"{path} does not say which model it is of; record it again") from error


def _checked(path: Path, records: Records) -> Records:
    """Bytes can be whole and still tell nonsense."""
    rows = {"prefill_counts": records.prefill_rows, "decode_counts": records.decode_rows}
    for name, expected in rows.items():
        counts = getattr(records, name)
        if (counts < 0).any() or (counts.sum(axis=2) != expected[:, None] * records.shape.top_k).any():
            raise RecordError(f"{path} is damaged: `{name}` does not add up to its step's rows; record it again")
    if not np.isfinite(records.time_s).all() or (np.diff(records.time_s) < 0).any():
        raise RecordError(f"{path} is damaged: its times run backwards; record it again")
    if not np.isfinite(records.signals).all() or not np.isfinite(records.signal_rows).all():
        raise RecordError(f"{path} is damaged: a signal is not a number; record it again")
    return records
