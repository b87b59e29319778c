"""Reading a prepared dataset for training: random access, scaled on the fly, safe in worker processes."""

import copy
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import Dataset

from ..models.modalities import resolve_modality
from .shards import FORMAT_VERSION, MANIFEST, METADATA, STATISTICS, ShardReader

if TYPE_CHECKING:
    from ..models.image_processing_solarchip import SolarChipImageProcessor
    from .streaming import ObservationStream

_OPEN_SHARDS = 128  # memory maps kept open a process, well below the usual limit of 1024 files


class Observations(Dataset):
    """A prepared dataset as a map-style torch dataset.

    An item is `{"pixel_values": (M, N, N) float32, "observed": (M,) bool}`: the images of one observation in the order
    of `modalities`, scaled by `processor`, zeros where missing. Files are memory-mapped and opened in the process that
    reads them, so that the object may be sent to the workers of a `DataLoader`, forked or spawned.

    Use `load_observations` to make one.

    Attributes:
        modalities: The names of the images, in order.
        processor: The image processor with the dataset's settings and statistics.
        statistics: The statistics as they stand in the dataset's `statistics.json`.
        metadata: One row an observation, in the order of this dataset: `time_nominal`, `time`, `split`, `rsun_arcsec`,
            `b0`, ..., and for each modality `{modality}_difference` (s), `{modality}_exposure`, ...
        manifest: What the dataset's `manifest.json` says.
    """

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        metadata: pd.DataFrame,
        statistics: dict[str, Any],
        modalities: Sequence[str],
        processor: "SolarChipImageProcessor",
    ):
        self.folder = folder
        self.manifest = manifest
        self.metadata = metadata
        self.statistics = statistics
        self.modalities = list(modalities)
        self.processor = processor
        self._locate()

    def _locate(self) -> None:
        self._shard = self.metadata["shard"].to_numpy(dtype=np.int64)
        self._row = self.metadata["row"].to_numpy(dtype=np.int64)
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._scaled: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": OrderedDict(), "_scaled": {}}  # open files stay in their process

    def __len__(self) -> int:
        return len(self._row)

    @property
    def observed(self) -> np.ndarray:
        """(len, M) bool: which images are there."""
        return np.stack([self.metadata[f"{name}_source"].notna().to_numpy() for name in self.modalities], axis=1)

    def physical(self, index: int) -> dict[str, np.ndarray | None]:
        """The images of an observation as they are stored.

        Args:
            index: Position in this dataset.

        Returns:
            For each modality a read-only (N, N) float16 or float32 view of the file in physical units, NaN where
            invalid; None where missing.
        """
        index = self._index(index)
        images = self._reader(int(self._shard[index])).images(int(self._row[index]))
        return {name: images[name] for name in self.modalities}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        size = self.processor.size
        pixel_values = np.empty((len(self.modalities), size, size), dtype=np.float32)  # every image is written once
        observed = np.zeros(len(self.modalities), dtype=bool)
        for position, (name, image) in enumerate(self.physical(index).items()):
            if image is None:
                pixel_values[position] = 0
            else:
                self._scale(image, name, out=pixel_values[position])
                observed[position] = True
        return {"pixel_values": torch.from_numpy(pixel_values), "observed": torch.from_numpy(observed)}

    def _scale(self, image: np.ndarray, name: str, out: np.ndarray) -> None:
        """What `processor.scale` gives; for float16 by a table of its 65536 values, half the time of computing them."""
        if image.dtype != np.float16:
            out[...] = self.processor.scale(image, name)
            return
        if name not in self._scaled:
            size = self.processor.size
            values = np.zeros((-(-(2**16) // size**2), size, size), dtype=np.float16)
            values.reshape(-1)[: 2**16] = np.arange(2**16, dtype=np.uint16).view(np.float16)
            values[np.isnan(values)] = np.nan  # one quiet pattern: the signalling ones among them raise warnings
            everywhere = copy.copy(self.processor)
            support = everywhere.support(name)
            if support is not None:
                everywhere.off_disk = "keep"
            table = everywhere.scale(values, name).reshape(-1)[: 2**16].copy()
            self._scaled[name] = table, None if support is None else support.astype(np.float32)
        table, inside = self._scaled[name]
        np.take(table, image.view(np.uint16), out=out, mode="clip")
        if inside is not None:
            np.multiply(out, inside, out=out)  # the table is finite; half the time of setting by a mask

    def select(self, indices: Any) -> "Observations":
        """A dataset of some of the observations.

        Args:
            indices: Positions in this dataset in the order wanted, or a (len,) bool mask.

        Returns:
            A new dataset that shares the files.
        """
        indices = np.asarray(indices)
        if indices.dtype == bool and indices.shape != (len(self),):
            raise ValueError(f"indices: expected a mask of {len(self)} observations, got {indices.shape}.")
        if indices.size and indices.dtype != bool and (indices.max() >= len(self) or indices.min() < -len(self)):
            raise IndexError(f"indices: expected positions below {len(self)}, got {indices.min()} to {indices.max()}.")
        part = copy.copy(self)
        part.metadata = self.metadata.iloc[indices if indices.size else []].reset_index(drop=True)
        part._locate()  # files and tables of its own
        return part

    def _index(self, index: int) -> int:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index: expected a position below {len(self)}, got {index}.")
        return position

    def _reader(self, shard: int) -> ShardReader:
        reader = self._readers.get(shard)
        if reader is None:
            path = self.folder / self.manifest["shards"][shard]["file"]
            reader = self._readers[shard] = ShardReader(path, self.modalities)
            if len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
        else:
            self._readers.move_to_end(shard)
        return reader

    def __repr__(self) -> str:
        return (
            f"Observations({len(self)} rows, {', '.join(self.modalities)}, {self.processor.size} px, "
            f"{str(self.folder)!r})"
        )


def load_observations(
    path: str | os.PathLike,
    modalities: Sequence[str] | None = None,
    split: str | None = None,
    processor: "SolarChipImageProcessor | None" = None,
    streaming: bool = False,
    *,
    revision: str | None = None,
    **stream_options: Any,
) -> "Observations | ObservationStream":
    """Opens a dataset that `prepare_dataset` wrote.

    Args:
        path: Its folder, or a dataset repository on the Hub (downloaded to the cache first).
        modalities: The images wanted, in this order; by default all, in the dataset's order. Others are not read.
        split: A part of it, as `"train"`; by default every row.
        processor: A processor to scale with; its settings must be those that the dataset was prepared with. By default
            one with the dataset's own settings and statistics.
        streaming: Whether to give an iterable instead of random access.
        revision: Branch, tag or commit on the Hub.
        **stream_options: Arguments of `ObservationStream`, with `streaming`.

    Returns:
        `Observations`, or an `ObservationStream` over them.

    Raises:
        FileNotFoundError: There is no dataset, or its preparation is unfinished.
        ValueError: An unknown modality or split, or a processor of other settings.
    """
    from ..models.image_processing_solarchip import SolarChipImageProcessor

    folder = _folder(path, revision)
    manifest = _read_manifest(folder / MANIFEST)
    statistics = json.loads((folder / STATISTICS).read_text(encoding="utf-8"))
    names = manifest["modalities"] if modalities is None else [resolve_modality(name) for name in modalities]
    absent = [name for name in names if name not in manifest["modalities"]]
    if absent or not names:
        raise ValueError(f"modalities: expected some of {manifest['modalities']}, got {names} in {folder}.")
    metadata = _read_metadata(folder / METADATA)
    if split is not None:
        if split not in manifest["splits"]:
            raise ValueError(f"split: expected one of {list(manifest['splits'])}, got {split!r} in {folder}.")
        metadata = metadata[metadata["split"] == split].reset_index(drop=True)
    if processor is None:
        settings = manifest["settings"]
        processor = SolarChipImageProcessor(
            modalities=names,
            statistics=statistics,
            off_disk=manifest["off_disk"],
            **{key: settings[key] for key in ("size", "geometry", "photometry", "degradation", "scaling")},
        )
    else:
        _check_processor(processor, statistics, names, folder)
    observations = Observations(folder, manifest, metadata, statistics, names, processor)
    if not streaming:
        if stream_options:
            raise TypeError(f"load_observations: {sorted(stream_options)} go with streaming=True only.")
        return observations
    from .streaming import ObservationStream

    return ObservationStream(observations, **stream_options)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}. Prepare the dataset again.") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT_VERSION or "settings" not in manifest:
        raise ValueError(
            f"{path}: expected a dataset that prepare_dataset wrote, of format {FORMAT_VERSION}, got format {found}. "
            "Name the folder of such a dataset, or prepare it again."
        )
    return manifest


def _read_metadata(path: Path) -> pd.DataFrame:
    """The rows without images; what a missing image leaves empty stays empty (pd.NA, None) and of its own type."""
    table = pq.read_table(path)
    frame = table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype(), pa.bool_(): pd.BooleanDtype()}.get)
    for name in frame.columns:
        if name.endswith("_source") or name == "split":
            frame[name] = pd.Series(table[name].to_pylist(), dtype=object, index=frame.index)
        elif name.endswith("_clipped"):
            frame[name] = frame[name].astype("Int32")
    return frame


def _folder(path: str | os.PathLike, revision: str | None) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        text = os.fspath(path)
        if text.count("/") != 1 or text.startswith((".", "/", "~")):
            raise FileNotFoundError(
                f"path: expected the folder of a prepared dataset or a repository on the Hub as 'owner/name', "
                f"got {text!r}. Write one with prepare_dataset."
            )
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        broken: Any = HfHubHTTPError.__bases__  # the HTTP client's errors too, as when a download breaks off
        try:
            folder = Path(snapshot_download(text, repo_type="dataset", revision=revision))
        except broken as error:
            raise FileNotFoundError(
                f"path: expected the folder of a prepared dataset, or a dataset repository that can be reached, "
                f"got {text!r}: no such folder here, and the Hub says: {error}"
            ) from error
    if not (folder / MANIFEST).exists():
        raise FileNotFoundError(
            f"{folder}: expected a prepared dataset, got a folder without {MANIFEST}. "
            "Run prepare_dataset (or `examples/prepare_data.py prepare`) to its end: it resumes where it stopped."
        )
    return folder


def _check_processor(processor: Any, statistics: dict[str, Any], names: Sequence[str], folder: Path) -> None:
    key = processor.statistics_key
    different = {name: (value, statistics[name]) for name, value in key.items() if statistics[name] != value}
    if different:
        text = ", ".join(f"{name}={ours!r} (dataset: {theirs!r})" for name, (ours, theirs) in different.items())
        raise ValueError(
            f"processor: expected the settings that {folder} was prepared with, got {text}. "
            "Leave the processor out, or prepare the dataset with these settings."
        )
    absent = [name for name in names if name not in processor.modalities]
    if absent:
        raise ValueError(f"processor: expected the modalities {list(names)}, got one without {absent}.")


__all__ = ["Observations", "load_observations"]
