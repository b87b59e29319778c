"""The format of a prepared dataset on disk: Arrow IPC shards, one record batch an observation.

An image is a null or an (N, N) list of float16 or float32 in physical units, NaN where invalid. Arrow files are
memory-mapped, so that reading one image of one modality touches the pages of that image only; the schema carries the
features of the `datasets` library, so that `datasets.load_dataset(folder)` gives the same rows as `Array2D`.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATISTICS = "statistics.json"
METADATA = "metadata.parquet"
FAILURES = "failures.parquet"
DATA_FOLDER = "data"

DTYPES = ("float16", "float32")
_UTC = pa.timestamp("us", tz="UTC")
_ROW_FACTS: tuple[tuple[str, pa.DataType], ...] = (
    ("time_nominal", _UTC),
    ("time", _UTC),
    ("split", pa.string()),
    ("observed", pa.int16()),
    ("near_real_time", pa.bool_()),
    ("approximate", pa.bool_()),
    ("rsun_arcsec", pa.float64()),
    ("b0", pa.float64()),
    ("l0", pa.float64()),
    ("observer_distance", pa.float64()),
)
_IMAGE_FACTS: tuple[tuple[str, pa.DataType], ...] = (
    ("time", _UTC),
    ("difference", pa.float64()),  # seconds after the row's time
    ("exposure", pa.float64()),  # seconds
    ("quality", pa.int64()),
    ("near_real_time", pa.bool_()),
    ("approximate", pa.bool_()),
    ("valid", pa.float32()),  # share of valid pixels inside the modality's support
    ("clipped", pa.int32()),  # pixels beyond the range of float16, stored as its largest number
    ("source", pa.string()),
)


def dataset_schema(modalities: Sequence[str], size: int, dtype: str) -> pa.Schema:
    """Arrow schema of the rows.

    Args:
        modalities: The image columns in order.
        size: Pixels on a side.
        dtype: `"float16"` or `"float32"`.

    Returns:
        The schema, with the features of the `datasets` library in its metadata.

    Raises:
        ValueError: Unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
    image = pa.list_(pa.list_(pa.float16() if dtype == "float16" else pa.float32()))
    fields = [pa.field(name, kind) for name, kind in _ROW_FACTS]
    features: dict[str, Any] = {name: _feature(kind) for name, kind in _ROW_FACTS}
    for modality in modalities:
        fields.append(pa.field(modality, image))
        features[modality] = {"shape": [size, size], "dtype": dtype, "_type": "Array2D"}
        for name, kind in _IMAGE_FACTS:
            fields.append(pa.field(f"{modality}_{name}", kind))
            features[f"{modality}_{name}"] = _feature(kind)
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: pa.DataType) -> dict[str, str]:
    names = {pa.string(): "string", pa.bool_(): "bool", pa.float64(): "float64", pa.float32(): "float32"}
    return {"dtype": names.get(kind, str(kind)), "_type": "Value"}


def fact_names(modalities: Sequence[str]) -> list[str]:
    """Columns that are no images."""
    return [name for name, _ in _ROW_FACTS] + [f"{m}_{name}" for m in modalities for name, _ in _IMAGE_FACTS]


class _HashingFile:
    """A file that is written once from start to end, and its SHA-256 on the way."""

    def __init__(self, path: Path):
        self.stream = open(path, "wb")  # noqa: SIM115 (closed by the writer)
        self.sha256 = hashlib.sha256()
        self.size = 0

    @property
    def closed(self) -> bool:
        return self.stream.closed

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self.sha256.update(view)
        self.size += view.nbytes
        self.stream.write(view)
        return view.nbytes

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self.stream.flush()

    def close(self) -> None:
        if not self.stream.closed:
            self.stream.flush()
            os.fsync(self.stream.fileno())
            self.stream.close()


def write_shard(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Writes a shard under a temporary name and renames it when it is whole.

    Args:
        path: Where the shard shall be.
        schema: From `dataset_schema`.
        rows: Rows by column name; images as (N, N) arrays of the schema's type, or None. Consumed one by one.

    Returns:
        `rows`, `bytes` and `sha256` of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    sink = _HashingFile(temporary)
    count = 0
    try:
        with pa.PythonFile(sink, mode="w") as output, pa.ipc.new_file(output, schema) as writer:
            for row in rows:
                writer.write_batch(pa.record_batch([_column(row.get(f.name), f.type) for f in schema], schema=schema))
                count += 1
        sink.close()
        os.replace(temporary, path)
    finally:
        sink.close()
        temporary.unlink(missing_ok=True)
    return {"rows": count, "bytes": sink.size, "sha256": sink.sha256.hexdigest()}


def _column(value: Any, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind) or value is None:
        return pa.array([value], kind)
    height, width = value.shape
    inner = pa.ListArray.from_arrays(
        pa.array(np.arange(0, value.size + 1, width), pa.int32()), pa.array(np.ascontiguousarray(value).ravel())
    )
    return pa.ListArray.from_arrays(pa.array([0, height], pa.int32()), inner)


class ShardReader:
    """Memory-mapped random access to the rows of one shard, reading only some columns.

    Args:
        path: The shard.
        columns: Names of the columns to read.

    Raises:
        ValueError: The file is no Arrow file, or lacks a column.
    """

    def __init__(self, path: Path, columns: Sequence[str]):
        try:
            # All columns are mapped and none is read: Arrow's own choice of columns would copy every batch whole.
            self._file = pa.ipc.open_file(pa.memory_map(str(path), "r"))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path}: expected a whole Arrow file, got {error}. Prepare the dataset again.") from error
        fields = self._file.schema.names
        missing = [name for name in columns if name not in fields]
        if missing:
            raise ValueError(f"{path}: columns: expected {missing}, got {fields}.")
        self._columns = list(columns)
        self.schema = pa.schema([self._file.schema.field(name) for name in columns])

    def __len__(self) -> int:
        return self._file.num_record_batches

    def images(self, row: int) -> dict[str, np.ndarray | None]:
        """Images of a row as read-only (N, N) views of the mapped file, None where missing."""
        batch = self._file.get_batch(row)
        return {name: _view(batch.column(name)) for name in self._columns}

    def facts(self) -> pa.Table:
        """All rows of the columns (none of them images)."""
        batches = [self._file.get_batch(i).select(self._columns) for i in range(len(self))]
        return pa.Table.from_batches([pa.record_batch(b.columns, schema=self.schema) for b in batches], self.schema)


def _view(column: pa.ListArray) -> np.ndarray | None:
    if column.null_count:
        return None
    rows = column.flatten()
    values = rows.flatten().to_numpy(zero_copy_only=True)
    return values.reshape(len(rows), -1)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


__all__ = [
    "DATA_FOLDER",
    "DTYPES",
    "FAILURES",
    "FORMAT_VERSION",
    "MANIFEST",
    "METADATA",
    "STATISTICS",
    "ShardReader",
    "dataset_schema",
    "fact_names",
    "write_json",
    "write_shard",
]
