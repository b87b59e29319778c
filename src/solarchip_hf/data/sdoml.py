"""SDOML v2: AIA and HMI images in Zarr, on disk or in the public S3 bucket, as rows of a catalogue.

A store holds a group a year and in it an array a channel, `2015/131A` or `2015/Bz`, of shape (time, 512, 512) in chunks
along time; the FITS keywords are attributes of the array, each a list with one value an image. The images are not in
the order of time everywhere. The public stores are `sdomlv2.zarr` (AIA) and `sdomlv2_hmi.zarr` below
`s3://gov-nasa-hdrl-data1/contrib/fdl-sdoml/fdl-sdoml-v2/`.
"""

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..models.header_cards import number, try_time
from ..models.headers import SolarImage, SolarImageError
from ..models.modalities import MODALITIES, resolve_modality
from ..models.pointing import RSUN_REFERENCE, earth_sun_distance
from ..models.readers import read_image
from .catalog import unusable_facts
from .sources import (
    CORRECTIONS,
    SEPARATOR,
    CardsAndPixels,
    absolute,
    contained_catalog,
    contained_facts,
    missing_package,
)

logger = logging.getLogger(__name__)

SUN_RADIUS = 976.0  # arcsec that every Sun is rescaled to (Galvez et al. 2019, section 2)
FRAME = 2457.6  # arcsec along a side of the frame: 4096 pixels of 0.6
UNIT_NOTES = {
    "aia": f"SDOML v2: {CORRECTIONS['sdoml']}.",
    "hmi": "SDOML v2: Bz of HMI's vector field in gauss, not the line-of-sight series; the Sun rescaled to 976 arcsec.",
}
# A year of a channel has some 170 keywords of 70,000 values each: these are kept.
_CARDS = (
    "T_OBS", "T_REC", "DATE-OBS", "EXPTIME", "QUALITY", "QLOOK", "WAVELNTH", "RSUN_OBS", "DSUN_OBS", "CRLT_OBS",
    "CRLN_OBS", "CADENCE", "DEG_COR",
)  # fmt: skip
_ARRAYS, _CHUNKS = 32, 12  # of a process: headers of arrays, and decoded chunks (63 MB each as published)


def scan_sdoml(
    stores: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    modalities: Sequence[str] | None = None,
    years: Iterable[int] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Reads the keyword lists of SDOML v2 stores into a catalogue.

    AIA images are in DN/s, divided by SDOML's degradation factor; `Bz` is taken as the magnetogram, `Bx` and `By` are
    left alone. The Sun's radius is fixed at 976 arcsec: plate scales are given for the radius of the day, so that both
    canonical geometries come out right.

    Args:
        stores: Folders or URLs (`s3://`, read anonymously) of the stores, as those of AIA and of HMI.
        modalities: Channels wanted; by default all.
        years: Years wanted; by default all.
        progress: Whether to show a progress bar.

    Returns:
        A table as of `scan_archive`, a row an image, sorted by time; `path` is `STORE::YEAR/CHANNEL::INDEX`, `notes`
        say how the values are to be understood.

    Raises:
        ImportError: zarr, or for `s3://` s3fs, is not installed.
        FileNotFoundError: There is no such store.
        ValueError: The stores hold no such images.
    """
    wanted = None if modalities is None else {resolve_modality(name) for name in modalities}
    kept_years = None if years is None else {str(year) for year in years}
    listed = [stores] if isinstance(stores, str | os.PathLike) else list(stores)
    arrays = []
    for store in (absolute(str(os.fspath(store)).rstrip("/")) for store in listed):
        for name in _array_names(store):
            year, _, channel = name.partition("/")
            modality = _modality(channel)
            if modality and (wanted is None or modality in wanted) and (kept_years is None or year in kept_years):
                arrays.append((store, name))
    if not arrays:
        raise ValueError(
            f"stores: expected groups YEAR/CHANNEL (as 2015/131A, 2015/Bz), got none of "
            f"{sorted(wanted) if wanted else 'our channels'} in {[str(store) for store in listed]}."
        )
    rows = []
    for store, name in tqdm(arrays, desc="scan", unit="array", disable=not progress):
        array, cards = _open_array(store, name)
        frame = np.broadcast_to(np.float32(0), array.shape[1:])
        for index in range(array.shape[0]):
            path = SEPARATOR.join((store, name, str(index)))
            try:
                header = _header(cards, index, name, array.shape[-1], path)
            except SolarImageError as error:
                rows.append(unusable_facts(path, str(error).removeprefix(f"{path}: ")))
                continue
            rows.append(contained_facts(path, header, frame, _note(header)))
    return contained_catalog(rows, len(rows))


def read_contained(path: str) -> SolarImage:
    """Reads the image that a name in a catalogue of `scan_sdoml` stands for.

    Its chunk is kept, since the next image is likely to be in it.

    Args:
        path: `STORE::YEAR/CHANNEL::INDEX`.

    Returns:
        The image: row 0 in the south, north up, in DN/s or gauss.

    Raises:
        SolarImageError: The name or the keywords of the image make no sense.
    """
    parts = path.split(SEPARATOR)
    if len(parts) != 3 or not parts[2].isdigit():
        raise SolarImageError(path, "name", "STORE::YEAR/CHANNEL::INDEX", path)
    store, name, index = parts[0], parts[1], int(parts[2])
    array, cards = _open_array(store, name)
    if index >= array.shape[0]:
        raise SolarImageError(path, "index", f"one below {array.shape[0]}, the images of {name}", str(index))
    header = _header(cards, index, name, array.shape[-1], path)
    step = array.chunks[0]
    pixels = _read_chunk(store, name, index // step)[index % step]
    image = read_image(CardsAndPixels(header, pixels))
    return replace(image, source=path, notes=(_note(header), *image.notes))


def _modality(channel: str) -> str | None:
    try:
        return resolve_modality(channel)
    except ValueError:
        return None


def _options(store: str) -> dict[str, Any]:
    return {"storage_options": {"anon": True}} if store.startswith("s3://") else {}


def _array_names(store: str) -> list[str]:
    """`YEAR/CHANNEL` of every array, without reading their attributes together."""
    try:
        import zarr
    except ImportError as error:
        raise missing_package("zarr", "reading SDOML") from error
    try:
        root = zarr.open_group(store, mode="r", use_consolidated=False, **_options(store))
    except ImportError as error:
        raise missing_package("s3fs", f"reading {store}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"stores: expected a Zarr group with a group a year, got none at {store}.") from error
    return [f"{year}/{name}" for year, group in sorted(root.groups()) for name in sorted(group.array_keys())]


@lru_cache(maxsize=_ARRAYS)
def _open_array(store: str, name: str) -> tuple[Any, dict[str, np.ndarray]]:
    """An array, and those of its keyword lists that are used, as compact columns."""
    try:
        import zarr
    except ImportError as error:
        raise missing_package("zarr", "reading SDOML") from error
    array = zarr.open_array(store, path=name, mode="r", **_options(store))
    if array.ndim != 3 or array.shape[1] != array.shape[2]:
        raise ValueError(f"{store}: {name}: expected an array (time, N, N), got {array.shape}.")
    cards = {}
    for key, values in array.metadata.attributes.items():
        card = str(key).upper().replace("__", "-")
        if card in _CARDS and isinstance(values, list) and len(values) == array.shape[0]:
            mixed = len({type(value) for value in values}) > 1
            cards[card] = np.array(values, dtype=object if mixed else None)
    array.metadata.attributes.clear()  # hundreds of MB for a year as published
    return array, cards


@lru_cache(maxsize=_CHUNKS)
def _read_chunk(store: str, name: str, chunk: int) -> np.ndarray:
    array, _ = _open_array(store, name)
    step = array.chunks[0]
    return np.asarray(array[chunk * step : (chunk + 1) * step], dtype=np.float32)


def _header(cards: Mapping[str, np.ndarray], index: int, name: str, size: int, path: str) -> dict[str, Any]:
    """The cards of one image, with the geometry that SDOML gave it."""
    header = {card: _plain(values[index]) for card, values in cards.items()}
    header = {card: value for card, value in header.items() if value is not None}
    modality = resolve_modality(name.rpartition("/")[2])
    hmi = MODALITIES[modality].instrument == "hmi"
    if hmi:
        header |= {"TELESCOP": "SDO/HMI", "INSTRUME": "HMI_COMBINED", "CONTENT": "MAGNETOGRAM", "BUNIT": "Gauss"}
    else:
        wavelength = MODALITIES[modality].wavelength
        if number(header, "WAVELNTH") not in (None, wavelength):
            raise SolarImageError(path, "WAVELNTH", f"{wavelength}, as the array is called", f"{header['WAVELNTH']}")
        header |= {"TELESCOP": "SDO/AIA", "INSTRUME": "AIA", "WAVELNTH": wavelength, "BUNIT": "DN/s"}
    return header | rescaled_geometry(header, size, FRAME / size, SUN_RADIUS, hmi)


def rescaled_geometry(
    header: Mapping[str, Any], size: int, plate_scale: float, sun_radius: float, tai: bool
) -> dict[str, Any]:
    """Cards of an image whose Sun was rescaled to a fixed radius, in terms of the radius of its day.

    Args:
        header: Cards with DSUN_OBS, RSUN_OBS or a time.
        size: Pixels on a side; the disk is in the middle, north up.
        plate_scale: arcsec per pixel at the fixed radius.
        sun_radius: The fixed radius in arcsec.
        tai: Whether times without a scale are TAI.

    Returns:
        CRPIX, CRVAL, CDELT, CROTA2, RSUN_OBS and the axes' names.
    """
    distance, written = number(header, "DSUN_OBS"), number(header, "RSUN_OBS")
    if distance is None or not 1.43e11 <= distance <= 1.55e11:
        time = try_time(header, "T_OBS", "DATE-OBS", default_scale="TAI" if tai else "UTC")
        distance = None if time is None else earth_sun_distance(time)
    if distance is not None:
        rsun = math.degrees(math.asin(RSUN_REFERENCE / distance)) * 3600.0
    else:
        rsun = written or sun_radius
    scale, middle = plate_scale * rsun / sun_radius, (size + 1) / 2
    return {
        "CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN", "CUNIT1": "arcsec", "CUNIT2": "arcsec", "CRPIX1": middle,
        "CRPIX2": middle, "CRVAL1": 0.0, "CRVAL2": 0.0, "CDELT1": scale, "CDELT2": scale, "CROTA2": 0.0,
        "RSUN_OBS": rsun,
    }  # fmt: skip


def _note(header: Mapping[str, Any]) -> str:
    if header["TELESCOP"] == "SDO/HMI":
        return UNIT_NOTES["hmi"]
    factor = number(header, "DEG_COR")
    return UNIT_NOTES["aia"] + (f" Its factor: DEG_COR = {factor:.4g}." if factor is not None else "")


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value


__all__ = ["UNIT_NOTES", "read_contained", "rescaled_geometry", "scan_sdoml"]
