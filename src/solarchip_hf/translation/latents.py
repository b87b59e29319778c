"""A dataset's latents, encoded once: what prior and ControlNet are trained on.

A folder holds safetensors shards of latents and class tokens, the observations' metadata, per-channel statistics over
the training split, and the autoencoder's own reconstruction error in physical units, which no translation can beat.
Everything is keyed by the autoencoder's weights, the dataset, its preparation and the way of storing: latents of
another origin are refused, never mixed in. Patch tokens are the latent's pixels in both towers, so only class tokens
are stored beside the latents.
"""

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from tqdm import tqdm

from ..data.observations import Observations
from ..data.shards import write_json
from ..models.distributed import rank, world_size
from ..models.modalities import resolve_modality
from ..models.modeling_solarchip import SolarChipForPreTraining
from ..models.settings import choice
from .components import condition_on_sources, latent_shape, normalise_latents
from .latent_statistics import Errors, channel_statistics, error_table, reconstruction_errors, shard_moments
from .shared_work import share_tasks
from .weights import weights_hash

FORMAT_VERSION = 1
KEY = "key.json"
MANIFEST = "manifest.json"
METADATA = "metadata.parquet"
_DTYPES = {"float16": torch.float16, "float32": torch.float32}
HELD_OUT = ("validation", "test")  # splits that nothing is trained on
_SHARD_ROWS, _SHARD_BYTES = 256, 2**30  # largest file, unless told otherwise


class LatentDataset(Dataset):
    """Latents that `encode_dataset` wrote, as a map-style torch dataset.

    An item is `{"latents": (M, z, h, w), "class_tokens": (M, z), "observed": (M,) bool}` in float32, not normalised, in
    the order of `modalities`; zeros where missing. Shards are memory-mapped in the process that reads them, and `read`
    touches nothing of a shard but the latents asked for.

    Args:
        folder: What `encode_dataset` wrote.

    Attributes:
        modalities: The channels, in order.
        shape: (z, h, w) of a latent.
        mean: Mean of each latent channel over the training split, by modality.
        std: Its deviation, likewise.
        reconstruction: By modality, what the autoencoder alone loses on held-out images: `mae`, `rmse`, `correlation`
            inside the modality's support, with the `unit` and the number of `images`.
        preparation: Photometry, degradation, geometry, size and scaling of the images.
        metadata: One row an observation: `time_nominal`, `split`, ...
        manifest: The whole of `manifest.json`.

    Raises:
        FileNotFoundError: There are no latents, or encoding is unfinished.
        ValueError: They are of another format.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise FileNotFoundError(
                f"{self.folder}: expected latents, got a folder without {MANIFEST}. Run encode_dataset to its end (the "
                "training examples do): it goes on where it stopped."
            )
        self.manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        if self.manifest["format"] != FORMAT_VERSION:
            raise ValueError(
                f"{self.folder}: expected latents of format {FORMAT_VERSION}, got {self.manifest['format']}. "
                "Encode them anew in another folder."
            )
        self.modalities: list[str] = self.manifest["modalities"]
        self.shape: tuple[int, int, int] = tuple(self.manifest["shape"])
        self.mean: dict[str, list[float]] = self.manifest["latent_mean"]
        self.std: dict[str, list[float]] = self.manifest["latent_std"]
        self.reconstruction: dict[str, dict[str, Any]] = self.manifest["reconstruction"]
        self.preparation: dict[str, Any] = self.manifest["preparation"]
        self.metadata = pd.read_parquet(self.folder / METADATA)
        self._rows = np.arange(len(self.metadata))
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files stay in their process

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def observed(self) -> np.ndarray:
        """(len, M) bool: which latents are there."""
        return np.stack([self.metadata[f"{name}_observed"].to_numpy(dtype=bool) for name in self.modalities], axis=1)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        file, row = self._locate(index)
        item = {name: file.get_slice(name)[row] for name in ("latents", "class_tokens", "observed")}
        return {name: value if name == "observed" else value.float() for name, value in item.items()}

    def _locate(self, index: int) -> tuple[Any, int]:
        """The open shard of an observation, and the row therein."""
        shard, row = divmod(int(self._rows[index]), self.manifest["shard_rows"])
        if shard not in self._open:
            self._open[shard] = safe_open(_shard_path(self.folder, shard), framework="pt")
        return self._open[shard], row

    def read(self, index: int, positions: Sequence[int], name: str = "latents") -> torch.Tensor:
        """Latents, or class tokens, of some channels of an observation; those of other channels are not read.

        Args:
            index: The observation.
            positions: The P channels, as `position` gives them.
            name: `"latents"` or `"class_tokens"`.

        Returns:
            (P, z, h, w) or (P, z) float32, not normalised.
        """
        file, row = self._locate(index)
        stored = file.get_slice(name)
        return torch.stack([stored[row, position] for position in positions]).float()

    def position(self, modality: str) -> int:
        """Place of a channel in the second axis.

        Raises:
            ValueError: There are no latents of it.
        """
        name = resolve_modality(modality)
        if name not in self.modalities:
            raise ValueError(f"modalities: expected some of {', '.join(self.modalities)} (the latents), got {name}.")
        return self.modalities.index(name)

    def select(self, mask: np.ndarray) -> "LatentDataset":
        """A dataset of the observations that a (len,) bool mask marks; it shares the files."""
        part = copy.copy(self)
        part.metadata = self.metadata[mask].reset_index(drop=True)
        part._rows, part._open = self._rows[mask], {}
        return part

    def split(self, name: str) -> "LatentDataset":
        """The observations of one part, as `"train"`."""
        return self.select((self.metadata["split"] == name).to_numpy())

    def __repr__(self) -> str:
        return f"LatentDataset({len(self)} rows, {', '.join(self.modalities)}, {self.shape}, {str(self.folder)!r})"


class PriorLatents(Dataset):
    """Single normalised latents, of one or of several channels: what a prior learns.

    An item is `{"target": (z, h, w) float32, "class_label": () int64}`, the label being the position in `modalities`.

    Args:
        latents: Where they come from; observations that lack a channel give fewer items.
        modalities: The targets that the prior shall know.

    Raises:
        ValueError: There are no latents of a channel, or no observation has one of them.
    """

    def __init__(self, latents: LatentDataset, modalities: Sequence[str]):
        self.latents = latents
        self.modalities = [resolve_modality(name) for name in modalities]
        self._positions = [latents.position(name) for name in self.modalities]
        self._items = np.argwhere(latents.observed[:, self._positions])  # (items, 2): observation, label
        if not len(self._items):
            raise ValueError(f"modalities: expected observations with one of {', '.join(self.modalities)}, got none.")

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row, label = (int(value) for value in self._items[index])
        latent = self.latents.read(row, [self._positions[label]])[0]
        target = normalise_latents(latent, self.modalities[label], self.latents.mean, self.latents.std)
        return {"target": target, "class_label": torch.tensor(label)}


class TranslationLatents(Dataset):
    """Pairs of sources and target, normalised: what a ControlNet learns.

    An item is `{"target": (z, h, w), "hint": (S z, h, w), "context": (S (1 + h w), z)}` in float32, as
    `condition_on_sources` makes them. Observations that lack the target or a source are left out, and counted.

    Args:
        latents: Where they come from.
        sources: The S source channels, in order.
        target: The target channel.

    Attributes:
        left_out: Observations that lack one of the channels.

    Raises:
        ValueError: The target is a source, a channel has no latents, or no observation has all of them.
    """

    def __init__(self, latents: LatentDataset, sources: Sequence[str], target: str):
        self.sources, self.target = [resolve_modality(name) for name in sources], resolve_modality(target)
        if not self.sources or self.target in self.sources or len(set(self.sources)) < len(self.sources):
            raise ValueError(
                f"sources: expected one or more different channels, the target {self.target} not among them, got "
                f"{self.sources}."
            )
        self._sources = [latents.position(name) for name in self.sources]
        self._target = latents.position(self.target)
        complete = latents.observed[:, [*self._sources, self._target]].all(axis=1)
        self.left_out = int((~complete).sum())
        self.latents = latents.select(complete)
        if not len(self.latents):
            raise ValueError(
                f"sources: expected observations with all of {', '.join([*self.sources, self.target])}, got none."
            )

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        statistics = self.latents.mean, self.latents.std
        latents = self.latents.read(index, [*self._sources, self._target])  # (S + 1, z, h, w)
        class_tokens = self.latents.read(index, self._sources, "class_tokens")  # (S, z)
        hint, context = condition_on_sources(latents[None, :-1], class_tokens[None], self.sources, *statistics)
        target = normalise_latents(latents[-1], self.target, *statistics)
        return {"target": target, "hint": hint[0], "context": context[0]}


def encode_dataset(
    model: SolarChipForPreTraining,
    observations: Observations,
    output_dir: str | os.PathLike,
    *,
    dtype: str = "float16",
    batch_size: int = 32,
    shard_rows: int | None = None,
    reconstruction_images: int = 128,
    progress: bool = True,
) -> LatentDataset:
    """Encodes a prepared dataset once; shards that are there already are kept, so that it may be interrupted.

    The latents of a VAE are the means of its posterior. Statistics are those of the rows of the split `"train"`, or of
    all rows where the dataset has no such split. Where `torch.distributed` is initialised, every process calls this and
    encodes its share of the shards, to a folder that all of them see; what is written does not depend on how many.

    A process holds up to three times the bytes of a shard while it encodes, and a batch of images on the device;
    statistics and errors are measured slice by slice.

    Args:
        model: The pretrained autoencoder, on the device that shall encode; it is put into evaluation mode.
        observations: The dataset, in the model's order of modalities.
        output_dir: Folder of the latents.
        dtype: How they are stored, `"float16"` or `"float32"`.
        batch_size: Observations encoded at a time.
        shard_rows: Observations a file; None: as many as 1 GiB holds, 256 at most.
        reconstruction_images: Most held-out images a modality on which the autoencoder's error is measured.
        progress: Whether to show a progress bar.

    Returns:
        The latents.

    Raises:
        FileNotFoundError: The processes do not see each other's shards.
        ValueError: The folder holds latents of another autoencoder, dataset or preparation; the dataset does not fit
            the model; or a latent is not finite in `dtype`.
    """
    choice("dtype", dtype, tuple(_DTYPES))
    folder, count = Path(output_dir), len(observations)
    if shard_rows is None:
        numbers = len(observations.modalities) * int(np.prod(latent_shape(model.config)))
        shard_rows = max(1, min(_SHARD_ROWS, _SHARD_BYTES // (numbers * _DTYPES[dtype].itemsize)))
    key = latents_key(model, observations, dtype=dtype, shard_rows=shard_rows)
    shards = [range(start, min(count, start + shard_rows)) for start in range(0, count, shard_rows)]
    model.eval()

    def begin(_: None) -> list[int] | None:
        _claim(folder, key)
        if (folder / MANIFEST).is_file():
            return None
        return [shard for shard in range(len(shards)) if not _shard_path(folder, shard).is_file()]

    # What the first process finds holds for all: none looks into a folder in which another writes already.
    (missing,) = share_tasks([None], begin)
    if missing is None:
        return LatentDataset(folder)
    done = count - sum(len(shards[shard]) for shard in missing)
    bar = tqdm(total=count, initial=done, desc="Encoding", unit="obs", disable=not progress)

    def encode(shard: int) -> None:
        _write_shard(
            _shard_path(folder, shard), _encode_rows(model, observations, shards[shard], _DTYPES[dtype], batch_size)
        )
        first = missing.index(shard) - rank()  # of this round
        bar.update(sum(len(shards[other]) for other in missing[first : first + world_size()]))

    share_tasks(missing, encode)
    bar.close()
    metadata = _metadata(observations)
    training = (metadata["split"] == "train").to_numpy(copy=True)
    training = training if training.any() else ~training

    def measure(shard: int) -> torch.Tensor:
        if not _shard_path(folder, shard).is_file():
            raise FileNotFoundError(
                f"{folder}: expected the shards of all processes, got none at {_shard_path(folder, shard).name}. Name "
                "a folder on a disk that all processes share."
            )
        return shard_moments(_shard_path(folder, shard), training[shards[shard].start : shards[shard].stop])

    moments = torch.stack(share_tasks(range(len(shards)), measure)).sum(0)
    apart = metadata["split"].isin(HELD_OUT).to_numpy()  # rows of gaps between the parts lie too close to training
    held_out = np.flatnonzero(apart if apart.any() else training)
    picked = np.unique(np.linspace(0, len(held_out) - 1, min(len(held_out), reconstruction_images)).astype(int))
    reconstruction = _reconstruction(model, folder, shard_rows, observations, held_out[picked], batch_size)

    def finish(_: None) -> None:
        mean, std = channel_statistics(moments, observations.modalities)
        temporary = folder / f".{METADATA}.tmp"
        metadata.to_parquet(temporary)
        temporary.replace(folder / METADATA)
        manifest = {
            "format": FORMAT_VERSION,
            "key": key,
            "modalities": observations.modalities,
            "observations": count,
            "shard_rows": shard_rows,
            "shape": list(latent_shape(model.config)),
            "latent_mean": mean,
            "latent_std": std,
            "preparation": observations.processor.statistics_key,
            "reconstruction": reconstruction,
        }
        write_json(folder / MANIFEST, manifest)  # last: its presence says that the latents are whole

    share_tasks([None], finish)
    return LatentDataset(folder)


def _metadata(observations: Observations) -> pd.DataFrame:
    """What is kept beside the latents: facts of the rows, and which channels are there, but no facts of the images."""
    metadata = observations.metadata.drop(columns=["shard", "row"])
    metadata = metadata[[name for name in metadata.columns if not name.startswith(tuple(observations.modalities))]]
    for position, name in enumerate(observations.modalities):
        metadata[f"{name}_observed"] = observations.observed[:, position]
    return metadata


def _reconstruction(
    model: SolarChipForPreTraining,
    folder: Path,
    shard_rows: int,
    observations: Observations,
    rows: np.ndarray,
    batch_size: int,
) -> dict[str, dict[str, Any]]:
    """The autoencoder's own error on some rows, by modality; batches are the same for any number of processes."""
    batches = []
    for position in range(len(observations.modalities)):
        kept = [int(row) for row in rows if observations.observed[row, position]]
        batches += [(position, kept[start : start + batch_size]) for start in range(0, len(kept), batch_size)]

    def measure(batch: tuple[int, list[int]]) -> Errors:
        stored = {row: (_shard_path(folder, row // shard_rows), row % shard_rows) for row in batch[1]}
        return reconstruction_errors(model, stored, observations, batch[0])

    totals: dict[str, Errors] = {}
    for (position, _), errors in zip(batches, share_tasks(batches, measure), strict=True):
        name = observations.modalities[position]
        totals[name] = totals.get(name, Errors()) + errors
    return {name: error_table(errors, name, observations.processor.statistics) for name, errors in totals.items()}


def latents_key(
    model: SolarChipForPreTraining, observations: Observations, *, dtype: str, shard_rows: int
) -> dict[str, Any]:
    """What latents depend on, as hashes and settings.

    Args:
        model: The autoencoder.
        observations: The dataset, or a part of it.
        dtype: As for `encode_dataset`.
        shard_rows: As for `encode_dataset`.

    Returns:
        `autoencoder` (of the weights), `dataset` (of its files, rows and statistics), `preparation`, `modalities`,
        `dtype` and `shard_rows`.

    Raises:
        ValueError: The dataset's modalities or size are not the model's.
    """
    config = model.config
    if (list(config.modalities), config.image_size) != (observations.modalities, observations.processor.size):
        raise ValueError(
            f"observations: expected {', '.join(config.modalities)} at {config.image_size} px as the autoencoder was "
            f"trained on, got {', '.join(observations.modalities)} at {observations.processor.size} px. Load the "
            "dataset and the autoencoder with the same modalities=."
        )
    rows = observations.metadata[["shard", "row"]].to_numpy(dtype=np.int64)
    dataset = hashlib.sha256(rows.tobytes())
    dataset.update("".join(observations.metadata["split"].astype(str)).encode())
    for part in (observations.manifest["shards"], observations.processor.statistics):
        dataset.update(json.dumps(part, sort_keys=True).encode())
    return {
        "autoencoder": weights_hash(model.state_dict()),
        "dataset": dataset.hexdigest(),
        "preparation": observations.processor.statistics_key,
        "modalities": observations.modalities,
        "dtype": dtype,
        "shard_rows": shard_rows,
    }


def _claim(folder: Path, key: dict[str, Any]) -> None:
    """Writes the key into an empty folder, or checks it against the one that is there."""
    path = folder / KEY
    if not path.is_file():
        write_json(path, key)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    different = [name for name in key if found.get(name) != key[name]]
    if different:
        raise ValueError(
            f"{folder}: expected latents of this autoencoder and dataset, got stale ones (different: "
            f"{', '.join(different)}). Remove the folder, or name another one."
        )


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"latents-{shard:05d}.safetensors"


def _write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


@torch.no_grad()
def _encode_rows(
    model: SolarChipForPreTraining, observations: Observations, rows: range, dtype: torch.dtype, batch_size: int
) -> dict[str, torch.Tensor]:
    latents, class_tokens, marks = [], [], []
    for start in range(rows.start, rows.stop, batch_size):
        items = [observations[row] for row in range(start, min(start + batch_size, rows.stop))]
        pixel_values = torch.stack([item["pixel_values"] for item in items])  # (B, M, H, H)
        observed = torch.stack([item["observed"] for item in items])  # (B, M)
        ids = list(range(observed.shape[1])) * len(items)
        # a missing image is zeros here, which is as good as any: its latent is never read
        encoded = model.solarchip(pixel_values.flatten(0, 1)[:, None].to(model.device), ids, return_dict=True)
        latents.append(encoded.latents.unflatten(0, observed.shape).cpu().to(dtype))
        class_tokens.append(encoded.pooler_output.unflatten(0, observed.shape).cpu().to(dtype))
        marks.append(observed)
    observed = torch.cat(marks)
    tensors = {"latents": torch.cat(latents), "class_tokens": torch.cat(class_tokens)}
    for name, values in tensors.items():
        values[~observed] = 0
        if not values.isfinite().all():
            raise ValueError(f"{name}: expected finite values in {dtype}, got others. Take dtype='float32'.")
    return {**tensors, "observed": observed}


__all__ = [
    "HELD_OUT",
    "LatentDataset",
    "PriorLatents",
    "TranslationLatents",
    "encode_dataset",
    "latents_key",
]
