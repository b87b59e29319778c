"""Surya's core-sdo files: one NetCDF a time with thirteen images of 4096 px, as rows of a catalogue.

A file holds the float32 variables `aia94` ... `aia1600`, `hmi_m`, `hmi_bx`, `hmi_by`, `hmi_bz`, `hmi_v`, 4096 x 4096
pixels of 0.6 arcsec; an index lists `path, timestep, present`. The files carry no FITS keywords.
"""

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..models.headers import SolarImage, SolarImageError
from ..models.modalities import MODALITIES, resolve_modality
from ..models.readers import read_image
from .catalog import unusable_facts
from .sdoml import FRAME, rescaled_geometry
from .sources import (
    CORRECTIONS,
    SEPARATOR,
    CardsAndPixels,
    contained_catalog,
    contained_facts,
    missing_package,
)

SUN_RADIUS = 976.0  # arcsec at 0.6 arcsec/px: the pipeline takes out the Earth's distance
UNIT_NOTES = {
    "aia": f"Surya core-sdo: {CORRECTIONS['surya']}.",
    "hmi": "Surya core-sdo: line-of-sight magnetogram in gauss; the Sun at the files' fixed size.",
}
_STAMP = re.compile(r"(\d{4})-?(\d{2})-?(\d{2})[_T -]?(\d{2}):?(\d{2})")
_TRUE = frozenset({"1", "1.0", "true", "yes"})


def scan_surya(
    source: str | os.PathLike,
    *,
    root: str | os.PathLike | None = None,
    modalities: Sequence[str] | None = None,
    sun_radius: float = SUN_RADIUS,
    progress: bool = True,
) -> pd.DataFrame:
    """Reads Surya's index, or a folder of its files, into a catalogue.

    AIA images are in DN/s, compensated for degradation; `hmi_m` is taken as the magnetogram, the vector field and the
    velocity are left alone. The exposure is not recorded, so that `photometry="dn"` is refused for them.

    Args:
        source: The index CSV (`path, timestep, present`), or a folder with files named by their time
            (`20150101_0000.nc`).
        root: Folder that the index's paths start from; by default the index's own.
        modalities: Channels wanted; by default all.
        sun_radius: Radius of the Sun in arcsec at 0.6 arcsec per pixel of 4096, if it was rescaled to another one.
        progress: Whether to show a progress bar.

    Returns:
        A table as of `scan_archive`, a row an image, sorted by time; `path` is `FILE::VARIABLE::TIME::SUN_RADIUS`. A
        file that is absent, unreadable or not `present` gives a row with the reason.

    Raises:
        ImportError: h5netcdf is not installed.
        FileNotFoundError: There is no such index or folder.
        ValueError: The index lacks a column, or no file is listed.
    """
    _library()
    wanted = None if modalities is None else {resolve_modality(name) for name in modalities}
    entries = _entries(Path(source), None if root is None else Path(root))
    if not entries:
        raise ValueError(f"source: expected an index or a folder of NetCDF files, got none in {source}.")
    rows = []
    for path, stamp, present in tqdm(entries, desc="scan", unit="file", disable=not progress):
        time = _time(stamp)
        if not present:
            rows.append(unusable_facts(str(path), "present: expected 1 in the index, got 0: the file is marked absent"))
            continue
        if time is None:
            rows.append(unusable_facts(str(path), f"time: expected YYYYMMDD_hhmm or an ISO time, got {stamp!r}"))
            continue
        try:
            shapes = _shapes(path)
        except (OSError, ValueError, KeyError, RuntimeError) as error:  # what h5py and h5netcdf say of a broken file
            rows.append(unusable_facts(str(path), f"file: expected a NetCDF file, got {type(error).__name__}: {error}"))
            continue
        for variable, shape in shapes.items():
            modality = _modality(variable)
            if modality is None or (wanted is not None and modality not in wanted):
                continue
            name = SEPARATOR.join((str(path), variable, f"{time:%Y-%m-%dT%H:%M:%S}", f"{sun_radius:g}"))
            cards = _cards(modality, time, shape[-1], sun_radius)
            note = UNIT_NOTES[MODALITIES[modality].instrument]
            rows.append(contained_facts(name, cards, np.broadcast_to(np.float32(0), shape), note))
    return contained_catalog(rows, len(entries))


def read_contained(path: str) -> SolarImage:
    """Reads the image that a name in a catalogue of `scan_surya` stands for.

    Args:
        path: `FILE::VARIABLE::TIME` and, if the Sun's radius is not 976 arcsec, `::SUN_RADIUS`.

    Returns:
        The image: row 0 in the south, north up, in DN/s or gauss, the file's fill value as NaN.

    Raises:
        SolarImageError: The name makes no sense, or the file lacks the variable.
    """
    file, variable, stamp, *rest = [*path.split(SEPARATOR), "", ""]
    time, modality = _time(stamp), _modality(variable)
    if time is None or modality is None:
        raise SolarImageError(path, "name", "FILE::VARIABLE::TIME", path)
    sun_radius = float(rest[0] or SUN_RADIUS)
    with _library().File(file, "r") as content:
        if variable not in content.variables:
            raise SolarImageError(path, "variable", f"one of {', '.join(content.variables)}", variable)
        stored = content.variables[variable]
        pixels = np.squeeze(np.array(stored[...], dtype=np.float32))
        fill = stored.attrs.get("_FillValue")
    if fill is not None and np.isfinite(np.asarray(fill, dtype=np.float32)).all():
        pixels[pixels == np.float32(np.asarray(fill).ravel()[0])] = np.nan
    if pixels.ndim != 2:
        raise SolarImageError(path, "shape", "one image (N, N)", str(pixels.shape))
    image = read_image(CardsAndPixels(_cards(modality, time, pixels.shape[-1], sun_radius), pixels))
    note = UNIT_NOTES[MODALITIES[modality].instrument]
    return replace(image, source=path, notes=(note, *image.notes))


def _library() -> Any:
    try:
        import h5netcdf
    except ImportError as error:
        raise missing_package("h5netcdf", "reading Surya's NetCDF") from error
    return h5netcdf


def _entries(source: Path, root: Path | None) -> list[tuple[Path, str, bool]]:
    """Files with the text of their time and whether they are present."""
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix in (".nc", ".nc4"))
        return [(path.absolute(), path.stem, True) for path in files]
    if not source.is_file():
        raise FileNotFoundError(
            f"source: expected Surya's index CSV or a folder of its files, got nothing at {source}."
        )
    with source.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        missing = {"path", "timestep", "present"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"source: expected the columns path, timestep, present, got none of {sorted(missing)}.")
        base = (root or source.parent).absolute()
        return [(base / row["path"], row["timestep"], row["present"].strip().lower() in _TRUE) for row in reader]


def _time(stamp: str) -> datetime | None:
    match = _STAMP.search(stamp)
    if match is None:
        return None
    try:
        return datetime(*(int(part) for part in match.groups()), tzinfo=UTC)  # type: ignore[misc,arg-type]
    except ValueError:
        return None


def _shapes(path: Path) -> dict[str, tuple[int, int]]:
    with _library().File(path, "r") as content:
        return {str(name): variable.shape[-2:] for name, variable in content.variables.items() if variable.ndim >= 2}


def _modality(variable: str) -> str | None:
    if variable == "hmi_m":
        return "hmi"
    return resolve_modality(variable) if variable in MODALITIES and variable != "hmi" else None


def _cards(modality: str, time: datetime, size: int, sun_radius: float) -> dict[str, Any]:
    """Cards that the files do not carry; every time is the slot of the file, in UTC."""
    stamp = f"{time:%Y-%m-%dT%H:%M:%S}Z"
    if modality == "hmi":
        header: dict[str, Any] = {"TELESCOP": "SDO/HMI", "INSTRUME": "HMI_COMBINED", "CONTENT": "MAGNETOGRAM"}
        header |= {"BUNIT": "Gauss", "T_OBS": stamp}
    else:
        header = {"TELESCOP": "SDO/AIA", "INSTRUME": "AIA", "WAVELNTH": MODALITIES[modality].wavelength}
        header |= {"BUNIT": "DN/s", "T_OBS": stamp}
    return header | rescaled_geometry(header, size, FRAME / size, sun_radius, tai=False)


__all__ = ["UNIT_NOTES", "read_contained", "scan_surya"]
