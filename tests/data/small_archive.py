"""Small archives of FITS files with the cards of real ones, and faults to plant in them."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from astropy.io import fits

SIZE = 64
RSUN_ARCSEC = 960.0


def disk(size: int = SIZE) -> np.ndarray:
    """(size, size) distance from the centre in solar radii on a frame of 2457.6 arcsec."""
    offset = (np.arange(size) - (size - 1) / 2) * 2457.6 / size / RSUN_ARCSEC
    return np.hypot(offset[:, None], offset[None, :])


def write_aia(
    folder: Path, time: datetime, wavelength: int, *, name: str | None = None, seed: int = 0, rice=True, **cards
) -> Path:
    """An AIA synoptic image, Rice-compressed in HDU 1 or plain, observed one second after its slot."""
    rng = np.random.default_rng((seed, wavelength, int(time.timestamp())))
    pixels = (200 * np.exp(-(disk() ** 2)) + rng.gamma(2.0, 10.0, (SIZE, SIZE))).astype(np.int16)
    header = fits.Header()
    observed = (time + timedelta(seconds=1)).strftime("%Y-%m-%dT%H:%M:%S.000")
    header.update(
        {
            "TELESCOP": "SDO/AIA", "INSTRUME": "AIA_3", "WAVELNTH": wavelength, "WAVEUNIT": "angstrom",
            "T_OBS": observed, "DATE-OBS": observed, "EXPTIME": 2.0, "QUALITY": 0, "LVL_NUM": 1.5,
            "CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN", "CUNIT1": "arcsec", "CUNIT2": "arcsec",
            "CRPIX1": (SIZE + 1) / 2, "CRPIX2": (SIZE + 1) / 2, "CRVAL1": 0.0, "CRVAL2": 0.0,
            "CDELT1": 2457.6 / SIZE, "CDELT2": 2457.6 / SIZE, "CROTA2": 0.0, "RSUN_OBS": RSUN_ARCSEC,
            "DSUN_OBS": 1.4959787e11, "RSUN_REF": 6.96e8, "CRLT_OBS": 3.0, "CRLN_OBS": 100.0,
        }
    )  # fmt: skip
    header.update(cards)
    path = folder / (name or f"AIA{time:%Y%m%d_%H%M}_{wavelength:04d}.fits")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not rice:
        fits.PrimaryHDU(pixels, header).writeto(path)
        return path
    image = fits.CompImageHDU(pixels, header, compression_type="RICE_1", tile_shape=(1, SIZE))
    fits.HDUList([fits.PrimaryHDU(), image]).writeto(path, checksum=True)
    return path


def write_hmi(folder: Path, slot: datetime, *, name: str | None = None, seed=0, nan=None, **cards) -> Path:
    """An HMI magnetogram of the 720 s series: TAI slot, rotated by 180 degrees, NaN off the disk."""
    rng = np.random.default_rng((seed, 6173, int(slot.timestamp())))
    pixels = rng.normal(0, 30, (SIZE, SIZE)).astype(np.float32)
    pixels[disk() > 1] = np.nan
    if nan is not None:
        pixels[nan] = np.nan
    header = fits.Header()
    header.update(
        {
            "TELESCOP": "SDO/HMI", "INSTRUME": "HMI_SIDE1", "WAVELNTH": 6173.0, "CONTENT": "MAGNETOGRAM",
            "BUNIT": "Gauss", "T_REC": f"{slot:%Y.%m.%d_%H:%M:%S}_TAI", "T_OBS": f"{slot:%Y.%m.%d_%H:%M:%S}_TAI",
            "DATE-OBS": f"{slot - timedelta(seconds=104):%Y-%m-%dT%H:%M:%S.00}", "QUALITY": 0, "QLOOK": 0,
            "CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN", "CUNIT1": "arcsec", "CUNIT2": "arcsec",
            "CRPIX1": (SIZE + 1) / 2, "CRPIX2": (SIZE + 1) / 2, "CRVAL1": 0.0, "CRVAL2": 0.0,
            "CDELT1": 2457.6 / SIZE, "CDELT2": 2457.6 / SIZE, "CROTA2": 180.0, "RSUN_OBS": RSUN_ARCSEC,
            "DSUN_OBS": 1.4959787e11, "RSUN_REF": 6.96e8, "CRLT_OBS": 3.0, "CRLN_OBS": 100.0, "CADENCE": 720.0,
        }
    )  # fmt: skip
    header.update(cards)
    path = folder / (name or f"hmi.M_720s.{slot:%Y%m%d_%H%M%S}_TAI.fits")
    path.parent.mkdir(parents=True, exist_ok=True)
    fits.PrimaryHDU(pixels, header).writeto(path)
    return path


def write_archive(folder: Path, days: int, start: datetime = datetime(2015, 1, 1, tzinfo=UTC)) -> list[Path]:
    """A day at 00:00 each: HMI, AIA 171 and AIA 1700 (at 00:02, as in the archive)."""
    paths = []
    for day in range(days):
        slot = start + timedelta(days=day)
        paths.append(write_hmi(folder / "hmi", slot))
        paths.append(write_aia(folder / "aia", slot, 171))
        paths.append(write_aia(folder / "aia", slot + timedelta(minutes=2), 1700, EXPTIME=1.0))
    return paths
