"""From a folder of files, or a prepared dataset, and a flare list to labelled parts: what a tuning command needs."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd

from ..models.image_processing_solarchip import SolarChipImageProcessor
from ..models.modalities import resolve_modality
from ..models.readers import read_image
from .catalog import scan_archive
from .durations import read_duration
from .flare_events import read_flare_events, to_utc
from .flare_observations import FlareObservations, label_observations, split_flares
from .observations import Observations, load_observations
from .pairing import pair_observations
from .preparation import prepare_dataset
from .splits import split_labels

logger = logging.getLogger(__name__)

# What of a processor decides how images are prepared.
SETTINGS = ("size", "geometry", "photometry", "degradation", "scaling")


def check_flare_data(data_dir: str | None, events: Sequence[str] | None, cut: Mapping[str, Any]) -> None:
    """Refuses, before any image is read, what no data can make good.

    Args:
        data_dir: A folder of files or a prepared dataset.
        events: CSV files of flares.
        cut: `shares`, `validation_start`, `test_start`, `gap`, `coverage`, `tolerance`, `horizon` and `latency`, as a
            user wrote them; None where nothing was said.

    Raises:
        ValueError: A folder or file is not there, a time cannot be read, or settings contradict each other.
    """
    if data_dir is None or not Path(data_dir).is_dir():
        raise ValueError(f"data_dir: expected a folder of FITS files or a prepared dataset, got {data_dir!r}.")
    absent = [path for path in events or [""] if not Path(path).is_file()]
    if absent:
        raise ValueError(f"events: expected the CSV file of a flare list, got {absent[0]!r}. Pass --events FILE.")
    shares, ends = cut["shares"], (cut["validation_start"], cut["test_start"])
    if shares and (len(shares) != 3 or min(shares) <= 0 or not np.isclose(sum(shares), 1)):
        raise ValueError(f"shares: expected three positive numbers that add up to 1, got {shares}.")
    if ends.count(None) == 1 or len(cut["coverage"] or "ab") != 2:
        raise ValueError("validation_start and test_start, and the ends of coverage: expected both or none.")
    if shares and cut["test_start"]:
        raise ValueError("shares, test_start: expected one of them, got both; dates would leave shares without effect.")
    for name in ("tolerance", "gap", "horizon", "latency"):
        read_duration(cut[name] or "27D", name, zero=name != "horizon")
    for name in ("validation_start", "test_start", "coverage"):
        try:
            to_utc(cut[name] or [])
        except ValueError as error:
            raise ValueError(f"{name}: expected a date as '2014-06-01': {error}.") from error


def choose_modalities(found: Sequence[str], wanted: Sequence[str] | None, known: Sequence[str] | None) -> list[str]:
    """The channels to use.

    Args:
        found: Those that the data hold.
        wanted: Those asked for; every one must be there.
        known: Those that a saved model has; of these, what is there. None: any.

    Returns:
        Names in the order of `wanted`, `known` or `found`.

    Raises:
        ValueError: One that was asked for is absent, or nothing is left.
    """
    names = [resolve_modality(name) for name in wanted or []]
    absent = [name for name in names if name not in found or (known is not None and name not in known)]
    chosen = names or [name for name in (found if known is None else known) if name in found]
    if absent or not chosen:
        model = "" if known is None else f", and of {', '.join(known)} (what the model knows)"
        raise ValueError(
            f"modalities: expected some of {', '.join(found)} (what the data hold){model}, got "
            f"{', '.join(absent) or 'none'}."
        )
    return chosen


def prepare_flare_archive(
    folder: str | os.PathLike,
    cache_dir: str | os.PathLike,
    settings: Mapping[str, Any],
    *,
    parts: Mapping[str, Any],
    events: pd.DataFrame | None = None,
    modalities: Sequence[str] | None = None,
    known: Sequence[str] | None = None,
    gap: str = "27D",
    tolerance: str = "6min",
    workers: int | None = None,
    overwrite: bool = False,
    report: Callable[[pd.DataFrame, pd.DataFrame], None] | None = None,
) -> Path:
    """Scans, pairs, splits and prepares a folder of files, once.

    Magnetograms are prepared too where there are any, be they asked for or not: a baseline of every forecast reads
    their statistics.

    Args:
        folder: A folder of FITS or JPEG2000 files.
        cache_dir: Where prepared datasets are kept; the name of this one follows from folder and settings.
        settings: Arguments of the image processor: those of `SETTINGS` that differ from its defaults.
        parts: As for `chronological_split`; statistics are those of the part `train`.
        events: The flares that shall label the images, to refuse synthetic ones for real images and the reverse.
        modalities: As `wanted` of `choose_modalities`.
        known: As for `choose_modalities`.
        gap: Gap at the borders of the parts.
        tolerance: Largest time difference within an observation.
        workers: Processes.
        overwrite: Whether to prepare again if the archive has changed.
        report: Called with the catalogue and with the pairs (their part in the column `split`) before the images are
            read.

    Returns:
        The folder of the prepared dataset.

    Raises:
        ValueError: No file can be used, images and flares are not of one Sun, or an argument makes no sense.
    """
    folder = Path(folder).resolve()
    facts = [str(folder), dict(settings), {k: str(v) for k, v in parts.items()}, modalities, known, gap, tolerance]
    digest = hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:8]
    target = Path(cache_dir) / f"{folder.name}-flares-{digest}"
    catalog = scan_archive(folder, index=target.with_suffix(".catalog.parquet"), workers=workers)
    found = list(catalog["modality"][catalog["usable"] & catalog["full_disk"].fillna(False)].dropna().unique())
    if not found:
        raise ValueError(f"data_dir: expected full-disk images of SDO in {folder}, got none that can be used.")
    chosen = choose_modalities(found, modalities, known)
    columns = chosen + [name for name in ("hmi",) if name in found and name not in chosen]
    anchor = "hmi" if "hmi" in chosen else chosen[0]
    pairs = cast(pd.DataFrame, pair_observations(catalog, tolerance, anchor=anchor, modalities=columns))
    if events is not None and len(events):
        _check_sun(pairs[anchor].iloc[0], events)
    pairs["split"] = split_labels(pairs["time_nominal"], parts, gap=gap)
    if report is not None:
        report(catalog, pairs)
    processor = SolarChipImageProcessor(modalities=columns, **settings)
    prepare_dataset(pairs, target, processor, workers=workers, overwrite=overwrite)
    return target


def _check_sun(path: str, events: pd.DataFrame) -> None:
    """Synthetic images have synthetic flares, real ones real ones: they share dates, and nothing else."""
    drawn = "SYNTHETIC" in str(read_image(path, header_only=True).header.get("ORIGIN", "")).upper()
    _check_kind(drawn, events, f"ORIGIN of {Path(path).name}")


def _check_kind(drawn: bool, events: pd.DataFrame, told_by: str) -> None:
    listed = events["source"].eq("synthetic")
    if not listed.eq(drawn).all():
        kinds = {True: "synthetic", False: "real"}
        raise ValueError(
            f"events: expected {kinds[drawn]} flares for the {kinds[drawn]} images ({told_by}), got "
            f"{kinds[not drawn]} ones. Give the list that belongs to the images."
        )


def load_flare_parts(
    folder: str | os.PathLike,
    events: Any,
    *,
    parts: Mapping[str, Any],
    model: str | os.PathLike | None = None,
    modalities: Sequence[str] | None = None,
    known: Sequence[str] | None = None,
    gap: str | None = None,
    prepared_parts: bool = True,
    **labels: Any,
) -> dict[str, FlareObservations]:
    """Labels the observations of a prepared dataset and gives each part.

    Args:
        folder: The dataset's folder.
        events: What `read_flare_events` gives, or the file or files that it shall read.
        parts: As for `split_flares`.
        model: A saved model, whose processor scales the images; None: the dataset's own statistics.
        modalities: As `wanted` of `choose_modalities`.
        known: As for `choose_modalities`.
        gap: Gap at the borders that are cut here; None: 27 days. A warning tells where none are cut.
        prepared_parts: Whether to keep the parts with which the dataset was prepared, where it has all the wanted.
        **labels: Arguments of `label_observations`.

    Returns:
        The labelled observations of each part.

    Raises:
        FileNotFoundError: There is no dataset.
        ValueError: As in the functions that do the work.
    """
    everything = cast(Observations, load_observations(folder))
    chosen = choose_modalities(everything.manifest["modalities"], modalities, known)
    processor = None if model is None else SolarChipImageProcessor.from_pretrained(model, modalities=chosen)
    observations = cast(Observations, load_observations(folder, chosen, processor=processor))
    listed = events if isinstance(events, pd.DataFrame) else read_flare_events(events)
    drawn = observations.manifest.get("synthetic_images")
    if drawn is not None and len(listed):
        _check_kind(bool(drawn), listed, "the dataset's manifest")
    labelled = label_observations(observations, listed, **labels)
    own = labelled.observations.metadata["split"].to_numpy()
    if prepared_parts and set(parts) <= set(observations.metadata["split"]):
        if gap is not None:
            logger.warning("gap=%s has no effect: the dataset's own parts are kept, with the gaps they came with", gap)
        empty = [name for name in parts if not (own == name).any()]
        if empty:  # cutting anew would test on what was prepared, or pretrained on, as training
            raise ValueError(
                f"events: expected a list that covers windows of every prepared part, got none of {', '.join(empty)}. "
                "Give a longer list, or cut the parts by dates."
            )
        return {name: labelled.select(own == name) for name in parts}
    return split_flares(labelled, parts, gap=gap or "27D")


__all__ = ["SETTINGS", "check_flare_data", "choose_modalities", "load_flare_parts", "prepare_flare_archive"]
