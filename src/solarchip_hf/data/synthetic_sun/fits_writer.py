"""Synthetic images as the FITS files that SDO's archives deliver.

Layouts follow AIA's synoptic level 1.5 series and HMI's `hmi.M_720s`: Rice-compressed int32 in HDU 1, the archives'
scale factors, file names, clocks and cards. Every file says in ORIGIN, CREATOR and HISTORY that it is synthetic;
nothing about flares, hazards or stored energy is written anywhere.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

from ...models.modalities import MODALITIES
from .ephemeris import (
    ASTRONOMICAL_UNIT,
    EPOCH,
    SOLAR_RADIUS,
    days_since_epoch,
    tai_minus_utc,
    tai_to_utc,
)
from .observation import HMI_SCALE_4096, Plate, Scene, north_up_plate
from .state import POINTING, RegionHistory, generator
from .surface import SurfaceNoise

ORIGIN = "SYNTHETIC (solarchip_hf)"
CREATOR = "solarchip_hf.data.SyntheticSun"
VERSION = 2  # of the drawn Sun: raised whenever the same seed gives other pixels
BLANK = -2147483648
AIA_BSCALE, HMI_BSCALE = 0.0625, 0.1

# Telescope and filter of each channel (Lemen et al. 2012, table 1)
_TELESCOPE = {
    "aia94": (4, "94_THIN"),
    "aia131": (1, "131_THIN"),
    "aia171": (3, "171_THIN"),
    "aia193": (2, "193_THIN"),
    "aia211": (2, "211_THIN"),
    "aia304": (4, "304_THIN"),
    "aia335": (1, "335_THIN"),
    "aia1600": (3, "1600"),
    "aia1700": (3, "1700"),
    "aia4500": (3, "4500"),
}
# Minutes after the slot: 1700 is exposed at odd multiples of two minutes only
_SLOT_OFFSET = {"aia1700": 2}


def file_path(modality: str, slot: pd.Timestamp) -> Path:
    """Relative path of an image, in the archives' dated folders.

    Args:
        modality: Name.
        slot: Nominal time: UTC for AIA, TAI for HMI.

    Returns:
        `aia/2010/05/01/H0000/AIA20100501_0000_0171.fits` or `hmi/2010/05/01/hmi.M_720s.20100501_000000_TAI.fits`.
    """
    if MODALITIES[modality].instrument == "hmi":
        return Path("hmi") / f"{slot:%Y/%m/%d}" / f"hmi.M_720s.{slot:%Y%m%d_%H%M%S}_TAI.fits"
    slot = slot + pd.Timedelta(minutes=_SLOT_OFFSET.get(modality, 0))
    wavelength = MODALITIES[modality].wavelength
    return Path("aia") / f"{slot:%Y/%m/%d}" / f"H{slot:%H}00" / f"AIA{slot:%Y%m%d_%H%M}_{wavelength:04d}.fits"


def observation_time(modality: str, slot: pd.Timestamp, seed: int) -> pd.Timestamp:
    """UTC of mid-exposure: some seconds after the slot, as in the archives; for HMI the slot is on TAI."""
    random = generator(seed, POINTING, MODALITIES[modality].wavelength, round((slot - EPOCH).total_seconds() / 60.0))
    if MODALITIES[modality].instrument == "hmi":
        return tai_to_utc(slot) + pd.Timedelta(milliseconds=int(random.integers(200, 4000)))
    delay = pd.Timedelta(milliseconds=int(random.integers(3_000, 12_000)))
    return slot + pd.Timedelta(minutes=_SLOT_OFFSET.get(modality, 0)) + delay


def native_plate(modality: str, scene: Scene) -> Plate:
    """The plate of a file: AIA centred with north up; HMI turned by about 180 degrees and off centre by up to 1 px."""
    plate = north_up_plate(modality, scene.size, scene.view)
    if MODALITIES[modality].instrument == "aia":
        return plate
    random = generator(scene.seed, POINTING, round(scene.days * 1440.0))
    shift = random.uniform(-1.0, 1.0, 2)
    rotation = 179.93 + 0.002 * random.standard_normal()
    centre = (plate.centre[0] + float(shift[0]), plate.centre[1] + float(shift[1]))
    return Plate(plate.size, plate.scale, plate.radius, centre, rotation)


def write_observation(
    history: RegionHistory,
    noise: SurfaceNoise,
    size: int,
    folder: Path,
    slot: pd.Timestamp,
    modalities: list[str],
    overwrite: bool,
) -> list[dict]:
    """Draws and writes the images of one slot.

    Args:
        history: Active regions.
        noise: Random surface fields.
        size: Pixels across.
        folder: Root of the archive.
        slot: Nominal time.
        modalities: Names.
        overwrite: Draw again what is there already.

    Returns:
        A record an image: `path, modality, time_nominal, written`.

    Raises:
        ValueError: A file is there that another Sun, another size or another program wrote.
    """
    paths = {name: folder / file_path(name, slot) for name in modalities}
    missing = [name for name, path in paths.items() if overwrite or not _already_written(path, history.seed, size)]
    if missing:
        # One state serves all channels of a slot: in the two minutes between them the Sun turns by 0.02 degrees.
        scene = Scene(history, noise, days_since_epoch(slot), size)
        plates = {name: native_plate(name, scene) for name in missing}
        for plate in dict.fromkeys(plates.values()):
            images = scene.draw(plate, [name for name in missing if plates[name] == plate])
            for name, (image, exposure) in images.items():
                observed = observation_time(name, slot, history.seed)
                _write(paths[name], image, _header(name, slot, observed, scene, plate, image, exposure))
    return [
        {"path": str(path), "modality": name, "time_nominal": slot, "written": name in missing}
        for name, path in paths.items()
    ]


def _already_written(path: Path, seed: int, size: int) -> bool:
    """Whether a complete file of this very Sun is there; files appear by renaming, so that one that exists is whole."""
    if not path.exists():
        return False
    from astropy.io import fits

    found: tuple | str
    try:
        header = fits.getheader(path, 1)
        found = (header.get("CREATOR"), header.get("SUNSEED"), header.get("NAXIS1"), header.get("SUNVERS"))
    except (OSError, IndexError) as error:
        found = f"a file that is no such FITS ({error})"
    if found != (CREATOR, seed, size, VERSION):
        raise ValueError(
            f"{path}: expected a file of SyntheticSun with (creator, seed, size, version) = "
            f"{(CREATOR, seed, size, VERSION)}, got {found}. Choose another folder, or pass overwrite=True."
        )
    return True


def _header(
    modality: str,
    slot: pd.Timestamp,
    observed: pd.Timestamp,
    scene: Scene,
    plate: Plate,
    image: np.ndarray,
    exposure: float | None,
) -> list[tuple]:
    """Cards (keyword, value, comment) of one image, in the archive's order."""
    aia = exposure is not None
    cards = _hmi_cards(slot, observed) if exposure is None else _aia_cards(modality, observed, exposure)
    view = scene.view
    valid = image[np.isfinite(image)].astype(np.float64)
    cards += [
        ("TOTVALS", image.size, "Expected number of data values (pixels)"),
        ("DATAVALS", valid.size, "Actual number of data values in image"),
        ("MISSVALS", image.size - valid.size, "Missing values: TOTVALS - DATAVALS"),
        ("DATAMIN", float(valid.min()), "Minimum value of all pixels"),
        ("DATAMAX", float(valid.max()), "Maximum value of all pixels"),
        ("DATAMEDN", float(np.median(valid)), "Median value of all pixels"),
        ("DATAMEAN", float(valid.mean()), "Mean value of all pixels"),
        ("DATARMS", float(valid.std()), "Rms deviation from the mean value"),
        ("CTYPE1", "HPLN-TAN", ""),
        ("CUNIT1", "arcsec", ""),
        ("CRVAL1", 0.0, "[arcsec] x of the reference pixel"),
        ("CDELT1", plate.scale, "[arcsec/pixel] image scale in x"),
        ("CRPIX1", plate.centre[0] + 1.0, "[pixel] disk centre in x, first pixel is 1"),
        ("CTYPE2", "HPLT-TAN", ""),
        ("CUNIT2", "arcsec", ""),
        ("CRVAL2", 0.0, "[arcsec] y of the reference pixel"),
        ("CDELT2", plate.scale, "[arcsec/pixel] image scale in y"),
        ("CRPIX2", plate.centre[1] + 1.0, "[pixel] disk centre in y, first pixel is 1"),
        ("CROTA2", plate.rotation, "[deg] rotation of the image"),
        # of the 4096 px detector, whatever the size of the image, as in the synoptic files
        ("R_SUN", view.rsun_arcsec / (0.6 if aia else HMI_SCALE_4096), "[pixel] radius of the Sun on the CCD"),
        ("DSUN_REF", ASTRONOMICAL_UNIT, "[m] reference distance to the Sun"),
        ("DSUN_OBS", view.distance, "[m] distance to the centre of the Sun"),
        ("RSUN_REF", SOLAR_RADIUS, "[m] reference radius of the Sun"),
        ("RSUN_OBS", view.rsun_arcsec, "[arcsec] apparent radius of the Sun"),
        ("CRLN_OBS", view.l0, "[deg] Carrington longitude of the observer"),
        ("CRLT_OBS", view.b0, "[deg] Carrington latitude of the observer"),
        ("CAR_ROT", view.carrington_rotation, "Carrington rotation number"),
        ("CREATOR", CREATOR, "draws synthetic images"),
        ("SUNSEED", scene.seed, "seed of the synthetic Sun"),
        ("SUNVERS", VERSION, "version of the synthetic Sun"),
        ("HISTORY", "Synthetic image: drawn by a model of the Sun, not observed by any instrument.", ""),
    ]
    return cards


def _aia_cards(modality: str, observed: pd.Timestamp, exposure: float) -> list[tuple]:
    camera, filter_name = _TELESCOPE[modality]
    start = observed - pd.Timedelta(seconds=exposure / 2.0)
    return [
        ("BSCALE", AIA_BSCALE, ""),
        ("BZERO", 0.0, ""),
        ("ORIGIN", ORIGIN, "not from any observatory"),
        ("DATE", _iso(observed + pd.Timedelta("7D")), "[ISO] nominal date of processing"),
        ("TELESCOP", "SDO/AIA", "telescope that is imitated"),
        ("INSTRUME", f"AIA_{camera}", "AIA_1 to AIA_4"),
        ("DATE-OBS", _iso(start), "[ISO] start of the exposure, UTC"),
        ("T_OBS", _iso(observed), "[ISO] middle of the exposure, UTC"),
        ("CAMERA", camera, ""),
        ("IMG_TYPE", "LIGHT", "Image type: LIGHT or DARK"),
        ("EXPTIME", exposure, "[sec] Exposure duration"),
        ("WAVELNTH", MODALITIES[modality].wavelength, "[angstrom] Wavelength"),
        ("WAVEUNIT", "angstrom", "Wavelength unit"),
        ("WAVE_STR", filter_name, "Wavelength_FilterPosition"),
        ("LVL_NUM", 1.5, "Data level"),
        ("QUALLEV0", 0, "Level 0 Quality word"),
        ("QUALITY", 0, "Level 1 Quality word"),
        ("ACS_MODE", "SCIENCE", "ACS pointing mode"),
        ("ACS_ECLP", "NO", "ACS eclipse flag"),
    ]


def _hmi_cards(slot: pd.Timestamp, observed: pd.Timestamp) -> list[tuple]:
    tai = observed + pd.Timedelta(seconds=tai_minus_utc(observed))
    return [
        ("BSCALE", HMI_BSCALE, ""),
        ("BZERO", 0.0, ""),
        ("BLANK", BLANK, "value of missing pixels"),
        ("ORIGIN", ORIGIN, "not from any observatory"),
        ("DATE", _iso(observed + pd.Timedelta("7D")), "[ISO] nominal date of processing"),
        # the archive's DATE-OBS lies 67.7 s before the TAI label of T_OBS in the years of TAI - UTC = 35 s
        ("DATE-OBS", _iso(observed - pd.Timedelta(seconds=32.7)), "[ISO] observation date, UTC"),
        ("TELESCOP", "SDO/HMI", "telescope that is imitated"),
        ("INSTRUME", "HMI_SIDE1", ""),
        ("WAVELNTH", 6173.0, "[angstrom] Wavelength"),
        ("WAVEUNIT", "angstrom", "Wavelength unit"),
        ("CAMERA", 1, ""),
        ("BUNIT", "Gauss", ""),
        ("CONTENT", "MAGNETOGRAM", ""),
        ("QUALITY", 0, "Quality word"),
        ("T_OBS", f"{tai:%Y.%m.%d_%H:%M:%S}.{tai.microsecond // 1000:03d}_TAI", "[TAI] middle of the observation"),
        ("T_REC", f"{slot:%Y.%m.%d_%H:%M:%S}_TAI", "[TAI] nominal time of the slot"),
        ("TRECSTEP", 720.0, "[sec] step of the slots"),
        ("CADENCE", 720.0, "[sec]"),
        ("QLOOK", 0, "1 for near-real-time data"),
    ]


def _write(path: Path, image: np.ndarray, cards: list[tuple]) -> None:
    """Writes a Rice-compressed FITS file through a temporary name in the same folder."""
    from astropy.io import fits

    scale = next(value for key, value, _ in cards if key == "BSCALE")
    finite = np.isfinite(image)
    counts = np.full(image.shape, BLANK, np.int32)
    counts[finite] = np.rint(image[finite] / scale).astype(np.int32)
    # tiles of 16 rows, not of one as in the archives: a third of the writing time saved, and no reader can tell
    tile = (16, len(counts))
    hdu = fits.CompImageHDU(data=counts, compression_type="RICE_1", tile_shape=tile)
    for key, value, comment in cards:
        if key == "HISTORY":
            hdu.header.add_history(value)
        else:
            hdu.header[key] = (value, comment)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=".part", prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(temporary, overwrite=True)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _iso(time: pd.Timestamp) -> str:
    return time.isoformat(timespec="milliseconds")
