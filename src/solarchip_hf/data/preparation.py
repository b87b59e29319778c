"""Preparation: paired files to a dataset of canonical images, in parallel, resumable, with its own statistics."""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ..models.modalities import MODALITY_NAMES, resolve_modality
from .catalog import scan_archive
from .execution import run_tasks
from .pairing import pair_observations
from .preparation_tasks import FLOAT16_MAX, TRAIN, WORK_FOLDER, Settings, Shard, prepare_shard, record_path
from .shards import (
    DATA_FOLDER,
    FAILURES,
    FORMAT_VERSION,
    MANIFEST,
    METADATA,
    STATISTICS,
    ShardReader,
    dataset_schema,
    fact_names,
    write_json,
)
from .sources import absolute, common_root, container_kind, corrected_processor, relative, unit_notes
from .splits import split_labels
from .statistics import Moments, merge_moments

if TYPE_CHECKING:
    from ..models.image_processing_solarchip import SolarChipImageProcessor

logger = logging.getLogger(__name__)

_SHARD_BYTES = 256 * 2**20
_SHARD_ROWS = 64
_PROCESSOR = "preprocessor_config.json"


def prepare_dataset(
    pairs: pd.DataFrame | str | os.PathLike,
    output_dir: str | os.PathLike,
    processor: "SolarChipImageProcessor",
    *,
    splits: Mapping[str, Any] | Sequence[str] | None = None,
    train_end: Any = None,
    gap: str = "27D",
    dtype: str = "float16",
    min_valid: float = 0.9,
    rows_per_shard: int | None = None,
    anchor: str = "hmi",
    tolerance: str = "6min",
    modalities: Sequence[str] | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
    retry_failures: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Writes paired observations as a dataset: canonical grid, physical units, missing images marked.

    The rows are cut into shards by a plan that depends on the pairs and the settings only. Each shard is one task for
    Dask, written under a temporary name and renamed, and recorded with its hash when it is whole: a second call after
    an interruption does what is left and gives the same files. Memory is bounded by one observation a worker. A file
    that cannot be read is listed with its reason in `failures.parquet` and is a missing image in its row; a row with no
    image left is dropped.

    The output holds `data/{split}-*.arrow` (one row an observation; also readable by `datasets.load_dataset`),
    `metadata.parquet` (the rows without images), `statistics.json` (mean and standard deviation of the transformed
    training images inside each modality's support, with their key, unit and source), `preprocessor_config.json` (the
    processor with these statistics), `failures.parquet` and `manifest.json`.

    Args:
        pairs: A table of `pair_observations`, or a folder of files that is scanned and paired first (the catalogue is
            kept in the output).
        output_dir: Folder of the dataset. One that holds the same preparation, whole or in part, is completed.
        processor: Gives size, geometry, photometry, degradation and scaling; its statistics play no part.
        splits: Named parts as for `chronological_split` (a mapping), or one label a row. By default all rows are
            `"train"`, or the labels of a column `split` of the pairs. Rows in a gap are kept under the label `"gap"`.
        train_end: Short for `splits={"train": train_end, "validation": None}`.
        gap: Gap at each border of the splits, where they are a mapping or `train_end`.
        dtype: `"float16"` (2 bytes a pixel, relative error 5e-4, largest number 65504: what lies beyond, as a
            saturated pixel scaled up from a short exposure may, is stored as 65504, counted per image in
            `{modality}_clipped` and reported) or `"float32"`.
        min_valid: An image with a smaller share of valid pixels inside its modality's support is a failure.
        rows_per_shard: By default as many as fill 256 MiB, at most 64.
        anchor: For pairing, where `pairs` is a folder.
        tolerance: For pairing, where `pairs` is a folder.
        modalities: The image columns; by default those of the pairs.
        workers: Local Dask processes, by default the number of cores; 0 works in this process (for debugging: a file
            that crashes its reader then ends it).
        scheduler: Address of a running Dask cluster, as `"tcp://host:8786"`; its workers must see the files and the
            output under the same paths.
        overwrite: Whether to delete a dataset that was prepared differently.
        retry_failures: Whether to do the shards again in which a file failed, as after fetching those files anew.
        progress: Whether to show a progress bar with an estimate of the time left.

    Images of SDOML and Surya (`scan_sdoml`, `scan_surya`) are prepared as files are. What their archives divided out
    of them is named: in `settings["unit_notes"]`, and as the `degradation` of the dataset's processor and statistics.

    Returns:
        The manifest: `settings`, `modalities`, `splits` (rows of each), `shards` (file, rows, bytes, sha256),
        `observations`, `images` (count a modality), `synthetic_images`, `failures` (count), `clipped_images`,
        `statistics`.

    Raises:
        FileExistsError: The output holds a dataset of other settings or other pairs, and `overwrite` is false.
        ValueError: The pairs are empty or ill-posed, or no image at all could be read.
    """
    output_dir = Path(output_dir)
    if not isinstance(pairs, pd.DataFrame):
        output_dir.mkdir(parents=True, exist_ok=True)
        catalog = scan_archive(pairs, index=output_dir / WORK_FOLDER / "catalog.parquet", progress=progress)
        pairs = cast(pd.DataFrame, pair_observations(catalog, tolerance, anchor=anchor, modalities=modalities))
    names = _checked(pairs, modalities)
    pairs = pairs.assign(split=_labels(pairs, splits, train_end, gap)).sort_values("time_nominal", kind="stable")
    kinds = {name: set(map(container_kind, pairs[name].dropna())) for name in names}
    processor = corrected_processor(processor, kinds)
    settings = Settings(
        output_dir=str(output_dir.absolute()),
        root=common_root([path for name in names for path in pairs[name].dropna()]),
        processor=processor,
        modalities=tuple(names),
        dtype=dtype,
        min_valid=min_valid,
    )
    dataset_schema(names, processor.size, dtype)  # refuses an unknown dtype before any work
    plan = _plan(pairs, names, settings, rows_per_shard)
    description = _describe(settings, plan)
    notes = unit_notes(kinds)
    if notes:
        description["unit_notes"] = notes
    _claim(output_dir, description, overwrite)

    records = {shard.name: record for shard in plan if (record := _finished(output_dir, shard)) is not None}
    if retry_failures:
        records = {name: record for name, record in records.items() if not record["failures"]}
    todo = [shard for shard in plan if shard.name not in records]
    if todo:  # shards change under it: until the end it is not whole
        (output_dir / MANIFEST).unlink(missing_ok=True)
    if records:
        logger.info("%d of %d shards are there already", len(records), len(plan))
    total = sum(len(shard.rows) for shard in plan)
    with tqdm(total=total, desc="prepare", unit="observation", disable=not progress) as bar:
        bar.update(sum(len(shard.rows) for shard in plan if shard.name in records))
        bar.unpause()  # the estimate counts from here
        for shard, record in run_tasks(prepare_shard, todo, settings, workers=workers, scheduler=scheduler):
            records[shard.name] = record
            bar.update(len(shard.rows))
    return _finish(output_dir, settings, plan, records, description)


def _checked(pairs: pd.DataFrame, modalities: Sequence[str] | None) -> list[str]:
    """The image columns of a table that can be prepared."""
    names = [resolve_modality(name) for name in modalities or pairs.attrs.get("modalities") or []]
    names = names or [name for name in MODALITY_NAMES if name in pairs.columns]
    missing = {"time", "time_nominal", *names} - set(pairs.columns)
    if missing or not names:
        raise ValueError(
            f"pairs: expected the columns of pair_observations (time, time_nominal, a column a modality), "
            f"got {list(pairs.columns)}, without {sorted(missing) or 'any modality'}."
        )
    if not len(pairs):
        raise ValueError("pairs: expected at least one observation, got none. See the report of pair_observations.")
    paths = pairs[names].to_numpy(dtype=object).ravel()
    paths = paths[~pd.isna(paths)]
    if len(set(paths)) < len(paths):
        twice = pd.Series(paths)[pd.Series(paths).duplicated()].iloc[0]
        raise ValueError(f"pairs: expected every file in one observation only, got {twice} in two.")
    empty = [name for name in names if pairs[name].isna().all()]
    if empty:
        raise ValueError(
            f"modalities: expected channels that some observation has, got {empty}, of which none of {len(pairs)} "
            f"observations has a file. Leave them out (modalities={[n for n in names if n not in empty]}), or pair "
            "with a larger tolerance."
        )
    return names


def _labels(pairs: pd.DataFrame, splits: Any, train_end: Any, gap: str) -> list[str]:
    if train_end is not None:
        if splits is not None:
            raise ValueError("splits: expected either splits or train_end, got both.")
        splits = {TRAIN: train_end, "validation": None}
    if isinstance(splits, Mapping):
        labels = split_labels(pairs["time_nominal"], splits, gap=gap).tolist()
    elif splits is None:
        labels = pairs["split"].tolist() if "split" in pairs else [TRAIN] * len(pairs)
    else:
        labels = [str(label) for label in splits]
    strange = [label for label in dict.fromkeys(labels) if not re.fullmatch(r"\w+", label)]
    if strange:
        raise ValueError(f"splits: expected names of letters, digits and underscores, got {strange}.")
    if len(labels) != len(pairs):
        raise ValueError(f"splits: expected a label for each of {len(pairs)} observations, got {len(labels)}.")
    return labels


def _plan(pairs: pd.DataFrame, names: Sequence[str], settings: Settings, rows_per_shard: int | None) -> list[Shard]:
    if rows_per_shard is None:
        image_bytes = settings.processor.size**2 * np.dtype(settings.dtype).itemsize
        rows_per_shard = int(np.clip(_SHARD_BYTES // (image_bytes * len(names)), 1, _SHARD_ROWS))
    rows = [
        {
            "time_nominal": row["time_nominal"].to_pydatetime(),
            "time": row["time"].to_pydatetime(),
            "split": row["split"],
            "paths": {name: absolute(row[name]) for name in names if not pd.isna(row[name])},
        }
        for row in pairs.to_dict("records")
    ]
    plan = []
    for split in dict.fromkeys(row["split"] for row in rows):
        part = [row for row in rows if row["split"] == split]
        count = -(-len(part) // rows_per_shard)
        for index in range(count):
            name = f"{split}-{index:05d}-of-{count:05d}.arrow"
            plan.append(Shard(name, tuple(part[index * rows_per_shard : (index + 1) * rows_per_shard])))
    return plan


def _describe(settings: Settings, plan: Sequence[Shard]) -> dict[str, Any]:
    """What a preparation is: equal descriptions give equal files."""
    processor = settings.processor
    digest = hashlib.sha256()
    for shard in plan:
        digest.update(shard.name.encode())
        for row in shard.rows:
            facts = [row["time_nominal"].isoformat(), row["time"].isoformat()]
            paths = sorted((name, relative(path, settings.root)) for name, path in row["paths"].items())
            digest.update(json.dumps([facts, paths]).encode())
    return {
        "format": FORMAT_VERSION,
        "modalities": list(settings.modalities),
        "dtype": settings.dtype,
        "min_valid": settings.min_valid,
        "size": processor.size,
        "geometry": processor.geometry,
        "photometry": processor.photometry,
        "degradation": processor.degradation,
        "scaling": processor.scaling,
        "shards": len(plan),
        "observations": sum(len(shard.rows) for shard in plan),
        "pairs_sha256": digest.hexdigest(),
    }


def _claim(output_dir: Path, description: dict[str, Any], overwrite: bool) -> None:
    """Marks the output as this preparation's, or refuses one that is another's."""
    path = output_dir / WORK_FOLDER / "plan.json"
    if path.exists():
        existing = json.loads(path.read_text(encoding="utf-8"))
        different = {key: existing.get(key) for key, value in description.items() if existing.get(key) != value}
        if different and not overwrite:
            changes = [
                "other files, times or splits"
                if key == "pairs_sha256"
                else f"{key} {theirs!r} (now {description[key]!r})"
                for key, theirs in different.items()
            ]
            raise FileExistsError(
                f"output_dir: expected an empty folder or the same preparation, got {output_dir} prepared with "
                f"{', '.join(changes)}. Choose another folder, or pass overwrite=True to delete it."
            )
        if different:
            shutil.rmtree(output_dir / DATA_FOLDER, ignore_errors=True)
            shutil.rmtree(output_dir / WORK_FOLDER / "records", ignore_errors=True)
            for name in (MANIFEST, STATISTICS, METADATA, FAILURES, _PROCESSOR):
                (output_dir / name).unlink(missing_ok=True)
    elif (output_dir / DATA_FOLDER).exists() and not overwrite:
        raise FileExistsError(
            f"output_dir: expected a folder without {DATA_FOLDER}/, got {output_dir}, which is no preparation of ours. "
            "Choose another folder."
        )
    _sweep(output_dir)
    write_json(path, description)


def _sweep(output_dir: Path) -> None:
    """Removes what processes that died were writing; one that lives on in vain cannot rename it any more."""
    for folder in (output_dir / DATA_FOLDER, output_dir / WORK_FOLDER / "records"):
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)


def _finished(output_dir: Path, shard: Shard) -> dict[str, Any] | None:
    """The record of a shard that is whole, else None."""
    record, file = record_path(output_dir, shard), output_dir / DATA_FOLDER / shard.name
    if not record.exists() or not file.exists():
        return None
    facts = json.loads(record.read_text(encoding="utf-8"))
    return facts if facts["bytes"] == file.stat().st_size else None


def _finish(
    output_dir: Path,
    settings: Settings,
    plan: Sequence[Shard],
    records: Mapping[str, dict[str, Any]],
    description: dict[str, Any],
) -> dict[str, Any]:
    """Writes what belongs to the whole dataset from the shards' records, in the plan's order."""
    _sweep(output_dir)  # of workers that died on the way
    ordered = [records[shard.name] for shard in plan]
    failures = [failure for record in ordered for failure in record["failures"]]
    kind = pa.schema([(name, pa.string()) for name in ("source", "modality", "time_nominal", "reason")])
    _write_parquet(pa.Table.from_pylist(failures, schema=kind), output_dir / FAILURES)
    if not sum(record["rows"] for record in ordered):
        raise ValueError(
            f"pairs: expected at least one readable image, got none of {len(failures)}; the first: "
            f"{failures[0]['source']}: {failures[0]['reason']} The others are listed in {output_dir / FAILURES}."
        )
    if failures:
        logger.warning("%d files could not be used: see %s", len(failures), output_dir / FAILURES)
    names = fact_names(settings.modalities)
    tables = []
    for number, record in enumerate(ordered):
        facts = ShardReader(output_dir / record["file"], names).facts()
        facts = facts.append_column("shard", pa.array([number] * len(facts), pa.int32()))
        tables.append(facts.append_column("row", pa.array(range(len(facts)), pa.int32())))
    metadata = pa.concat_tables(tables)
    _write_parquet(metadata.replace_schema_metadata(None), output_dir / METADATA)

    statistics = _statistics(settings, ordered, metadata)
    if "unit_notes" in description:
        statistics["source"] += "; " + " ".join(dict.fromkeys(description["unit_notes"].values()))
    write_json(output_dir / STATISTICS, statistics)
    _save_processor(output_dir, settings, statistics)
    labels = metadata["split"].to_pylist()
    manifest = {
        "format": FORMAT_VERSION,
        "settings": description,
        "off_disk": settings.processor.off_disk,
        "modalities": list(settings.modalities),
        "observations": len(labels),
        "splits": {split: labels.count(split) for split in dict.fromkeys(labels)},
        "images": {name: sum(record["images"][name] for record in ordered) for name in settings.modalities},
        "clipped_images": sum(record["clipped_images"] for record in ordered),
        "synthetic_images": sum(record.get("synthetic_images", 0) for record in ordered),
        "failures": len(failures),
        "shards": [{key: record[key] for key in ("file", "rows", "bytes", "sha256")} for record in ordered],
        "statistics": statistics,
    }
    if manifest["clipped_images"]:
        logger.warning(
            "%d images hold values beyond %g, stored as that: see the columns *_clipped, or use dtype='float32'",
            manifest["clipped_images"],
            FLOAT16_MAX,
        )
    write_json(output_dir / MANIFEST, manifest)  # last: its presence says that the dataset is whole
    return manifest


def _statistics(settings: Settings, records: Sequence[dict[str, Any]], metadata: pa.Table) -> dict[str, Any]:
    from ..models.photometry import physical_unit

    processor = settings.processor
    entries = {}
    for name in settings.modalities:
        total = merge_moments(Moments(**image) for record in records for image in record["moments"][name])
        if not total.count:
            logger.warning("no training image of %s: the dataset has no statistics for it", name)
            continue
        entries[name] = {
            "mean": total.mean,
            "std": total.std,
            "unit": physical_unit(name, processor.photometry),
            "count": total.count,
        }
    times = sorted(
        time for time, split in zip(metadata["time"].to_pylist(), metadata["split"].to_pylist(), strict=True)
        if split == TRAIN
    )  # fmt: skip
    span = f", {times[0]:%Y-%m-%d} to {times[-1]:%Y-%m-%d}" if times else ""
    return {
        **processor.statistics_key,
        "source": f"computed on {len(times)} training observations of this dataset{span}",
        "modalities": entries,
    }


def _save_processor(output_dir: Path, settings: Settings, statistics: dict[str, Any]) -> None:
    missing = [name for name in settings.modalities if name not in statistics["modalities"]]
    if missing:
        logger.warning("no processor is saved beside the dataset: it would lack the statistics of %s", missing)
        return
    processor = settings.processor
    names = ("size", "geometry", "photometry", "degradation", "scaling", "off_disk")
    kept = {name: getattr(processor, name) for name in names}
    type(processor)(modalities=settings.modalities, statistics=statistics, **kept).save_pretrained(output_dir)


def _write_parquet(table: pa.Table, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    pq.write_table(table, temporary)
    os.replace(temporary, path)


__all__ = ["prepare_dataset"]
