"""The task of preparation that runs on a worker: one shard's files to canonical images, written and recorded."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .isolation import IsolatedCaller
from .shards import DATA_FOLDER, dataset_schema, write_json, write_shard
from .sources import open_image, relative, uncorrected_processor
from .statistics import image_moments, support_mask

logger = logging.getLogger(__name__)

TRAIN = "train"
WORK_FOLDER = ".preparation"  # plan and records of finished shards; hidden from `datasets`
FLOAT16_MAX = float(np.finfo(np.float16).max)  # 65504


@dataclass(frozen=True)
class Settings:
    """What every shard's worker needs to know."""

    output_dir: str
    root: str
    processor: Any
    modalities: tuple[str, ...]
    dtype: str
    min_valid: float


@dataclass(frozen=True)
class Shard:
    """One shard of the plan: its file name and its rows."""

    name: str
    rows: tuple[dict[str, Any], ...] = field(repr=False)


def record_path(output_dir: Path, shard: Shard) -> Path:
    """Where the record of a shard lies: written after the shard itself, so that its presence says that it is whole."""
    return output_dir / WORK_FOLDER / "records" / f"{shard.name}.json"


def prepare_shard(shard: Shard, settings: Settings, isolate: bool = False) -> dict[str, Any]:
    """Reads, registers and writes the rows of one shard: the task that runs on a worker.

    Args:
        shard: From the plan.
        settings: Of the preparation.
        isolate: Whether files are read in a process apart, which may die.

    Returns:
        The shard's record, as written beside the plan: rows, bytes, sha256, moments of every
        training image, counts, failures.
    """
    output_dir = Path(settings.output_dir)
    schema = dataset_schema(settings.modalities, settings.processor.size, settings.dtype)
    failures: list[dict[str, Any]] = []
    moments: dict[str, list[dict[str, float]]] = {name: [] for name in settings.modalities}
    images = dict.fromkeys(settings.modalities, 0)
    clipped = drawn = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal clipped, drawn
        for planned in shard.rows:
            row = _prepare_row(planned, settings, read, failures)
            if row is None:
                continue
            drawn += row["synthetic"]
            for name in settings.modalities:
                image = row.get(name)
                if image is None:
                    continue
                images[name] += 1
                clipped += row[f"{name}_clipped"] > 0
                if planned["split"] == TRAIN:
                    geometry, scaling = settings.processor.geometry, settings.processor.scaling
                    moments[name].append(image_moments(image, name, geometry=geometry, scaling=scaling).to_dict())
            yield row

    with IsolatedCaller(open_image) as caller:
        read = caller.call if isolate else open_image
        record = write_shard(output_dir / DATA_FOLDER / shard.name, schema, rows())
    record = {
        "file": f"{DATA_FOLDER}/{shard.name}",
        **record,
        "moments": moments,
        "images": images,
        "clipped_images": int(clipped),
        "synthetic_images": drawn,
        "failures": failures,
    }
    write_json(record_path(output_dir, shard), record)
    return record


def _prepare_row(
    planned: dict[str, Any], settings: Settings, read: Callable[[Any], Any], failures: list[dict[str, Any]]
) -> dict[str, Any] | None:
    row: dict[str, Any] = {key: planned[key] for key in ("time_nominal", "time", "split")}
    row.update(observed=0, near_real_time=False, approximate=False, synthetic=0)
    size = settings.processor.size
    for name, path in planned["paths"].items():
        source = relative(path, settings.root)
        try:
            processor = uncorrected_processor(settings.processor, path)
            facts, image = processor.to_physical(read((path, name)), name)
            valid = float(np.isfinite(image[support_mask(name, size, settings.processor.geometry)]).mean())
            if valid < settings.min_valid:
                raise ValueError(
                    f"pixels: expected at least {settings.min_valid:.0%} valid inside the support, got {valid:.1%}."
                )
        except Exception as error:  # belongs to the file, and is reported with it
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            text = text.removeprefix(f"{path}: ")
            logger.warning("left out %s: %s", path, text)
            time = planned["time_nominal"].isoformat()
            failures.append({"source": source, "modality": name, "time_nominal": time, "reason": text})
            continue
        image, beyond = _stored(image, settings.dtype)
        difference = None if facts.time is None else (facts.time - planned["time"]).total_seconds()
        row[name] = image
        row[f"{name}_time"] = facts.time
        row[f"{name}_difference"] = difference
        row[f"{name}_exposure"] = facts.exposure
        row[f"{name}_quality"] = facts.quality
        row[f"{name}_near_real_time"] = facts.near_real_time
        row[f"{name}_approximate"] = facts.approximate
        row[f"{name}_valid"] = valid
        row[f"{name}_clipped"] = beyond
        row[f"{name}_source"] = source
        row["near_real_time"] |= facts.near_real_time
        row["approximate"] |= facts.approximate
        if not row["observed"]:  # the observer's place is that of the first modality: seconds change nothing
            for fact in ("rsun_arcsec", "b0", "l0", "observer_distance"):
                row[fact] = getattr(facts, fact)
        row["observed"] += 1
        row["synthetic"] += "SYNTHETIC" in str(facts.header.get("ORIGIN", "")).upper()
    return row if row["observed"] else None


def _stored(image: np.ndarray, dtype: str) -> tuple[np.ndarray, int]:
    """The image in its stored type, and how many pixels lay beyond the type's range."""
    if dtype == "float32":
        return np.asarray(image, dtype=np.float32), 0
    beyond = int((np.abs(image) > FLOAT16_MAX).sum())
    return np.clip(image, -FLOAT16_MAX, FLOAT16_MAX).astype(np.float16), beyond


__all__ = ["FLOAT16_MAX", "TRAIN", "WORK_FOLDER", "Settings", "Shard", "prepare_shard", "record_path"]
