"""From a header's WCS to the canonical grid, and back to a FITS header.

The canonical grid of N x N pixels is north-up in FITS order: row 0 is the southern edge, column 0 the eastern one
(show it with `origin="lower"`). The disk's centre lies at (N - 1) / 2 on both axes, counted from 0. With
`geometry="rsun"` the solar radius is 406.67 N / 1024 px on every day of the year; with `"arcsec"` a pixel is
2.4 * 1024 / N arcsec; with `"none"` the image is only resized.

Helioprojective coordinates are taken as an affine function of the pixels. The gnomonic (TAN) projection that FITS
headers of SDO name departs from that by theta^3 / 3, or 0.008 arcsec at the limb (theta = 1000 arcsec): 0.013 px of
0.6 arcsec, 0.003 px of 2.4 arcsec.
"""

import math
from dataclasses import replace
from datetime import timedelta

import numpy as np

from .headers import SolarImage, SolarImageError
from .modalities import MODALITIES
from .resampling import affine_resample, resize

# 976 arcsec at 2.4 arcsec per pixel, the radius that SDOML rescales every image to (Galvez et al. 2019).
RSUN_PIXELS_1024 = 406.67
PLATE_SCALE_1024 = 2.4
# Radius of the circle inscribed in the frame, in solar radii of the `rsun` grid.
SUPPORT_RADIUS = 512 / RSUN_PIXELS_1024
GEOMETRIES = ("rsun", "arcsec", "none")


def _radius_squared(size: int) -> np.ndarray:
    """(size, size) squared distance from the disk's centre in pixels."""
    offset = np.arange(size) - (size - 1) / 2
    return offset[:, None] ** 2 + offset[None, :] ** 2


def disk_mask(size: int, radius: float = 1.0) -> np.ndarray:
    """Pixels of the canonical `rsun` grid whose centre lies within a circle about the disk's centre.

    Args:
        size: Pixels on a side.
        radius: Radius of the circle in solar radii; `SUPPORT_RADIUS` gives the circle inscribed in the frame.

    Returns:
        (size, size) bool.
    """
    return _radius_squared(size) <= (radius * RSUN_PIXELS_1024 * size / 1024) ** 2


def disk_fraction(size: int, grid: int) -> np.ndarray:
    """Share of the solar disk in each cell of a grid laid over the canonical `rsun` image.

    Args:
        size: Pixels of the image on a side.
        grid: Cells on a side, as the patches of a ViT; row-major, row 0 in the south.

    Returns:
        (grid, grid) float64 in 0..1.

    Raises:
        ValueError: `size` is not a multiple of `grid`.
    """
    if grid < 1 or size % grid:
        raise ValueError(f"grid: expected a divisor of size {size}, got {grid}; choose a patch size that divides it.")
    cell = size // grid
    return disk_mask(size).reshape(grid, cell, grid, cell).mean(axis=(1, 3))


def canonical_scale(rsun_arcsec: float, size: int, geometry: str) -> float:
    """Arcsec per canonical pixel of an image whose solar radius is `rsun_arcsec`."""
    if geometry == "rsun":
        return rsun_arcsec / (RSUN_PIXELS_1024 * size / 1024)
    if geometry == "arcsec":
        return PLATE_SCALE_1024 * 1024 / size
    raise ValueError(f"geometry: expected 'rsun' or 'arcsec', got {geometry!r}; 'none' has no scale of its own.")


def _world_matrix(image: SolarImage) -> np.ndarray:
    """2 x 2 matrix from pixel offsets (x, y) to helioprojective arcsec: diag(CDELT) PC."""
    return np.asarray(image.cdelt, dtype=np.float64)[:, None] * np.asarray(image.rotation, dtype=np.float64)


def _check_wcs(image: SolarImage) -> np.ndarray:
    values = [*image.crpix, *image.crval, *image.cdelt, *np.ravel(image.rotation)]
    if not all(math.isfinite(value) for value in values):
        raise SolarImageError(image.source, "CRPIX/CRVAL/CDELT/CROTA2", "finite numbers", repr(values))
    world = _world_matrix(image)
    if abs(np.linalg.det(world)) < 1e-12:
        raise SolarImageError(image.source, "CDELT1/CDELT2", "a plate scale in arcsec per pixel", repr(image.cdelt))
    return world


def to_canonical(image: SolarImage, size: int, geometry: str = "rsun") -> np.ndarray:
    """Puts an image on the canonical grid by one anti-aliased affine resampling.

    Surface brightness is conserved (a mean, not a sum): DN stay DN of a native pixel, gauss stay gauss.

    Args:
        image: The image in its native pixels with its WCS.
        size: Pixels of the result on a side.
        geometry: `"rsun"`, `"arcsec"` or `"none"`; the last takes no notice of the WCS, keeps the image's own
            orientation and counts missing pixels as zeros, as the published method does.

    Returns:
        (size, size) float32 in the image's unit, row 0 in the south; NaN where invalid or outside the frame.

    Raises:
        SolarImageError: The WCS or the solar radius cannot be used.
        ValueError: Unknown `geometry`.
    """
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry: expected one of {', '.join(GEOMETRIES)}, got {geometry!r}.")
    height, width = image.shape
    if geometry == "none":
        if height != width:
            raise SolarImageError(image.source, "NAXIS1/NAXIS2", "a square image", f"{width} x {height}")
        return resize(image.data, size)
    world = _check_wcs(image)
    if not (math.isfinite(image.rsun_arcsec) and image.rsun_arcsec > 0):
        raise SolarImageError(image.source, "RSUN_OBS", "the apparent solar radius in arcsec", f"{image.rsun_arcsec}")
    to_pixels = np.linalg.inv(world)
    origin = np.asarray(image.crpix, dtype=np.float64) - 1 - to_pixels @ np.asarray(image.crval, dtype=np.float64)
    matrix = to_pixels * canonical_scale(image.rsun_arcsec, size, geometry)
    return affine_resample(image.data, matrix, origin, size)


def canonical_facts(image: SolarImage, size: int, geometry: str) -> SolarImage:
    """The header facts of an image after `to_canonical`, without its pixels.

    Returns:
        A `SolarImage` with the canonical WCS and an empty (0, 0) `data`; `header` stays the original one.
    """
    empty = np.empty((0, 0), dtype=np.float32)
    if geometry == "none":
        step = image.shape[1] / size
        x, y = ((value - 0.5) / step + 0.5 for value in image.crpix)
        return replace(image, data=empty, crpix=(x, y), cdelt=(image.cdelt[0] * step, image.cdelt[1] * step))
    scale = canonical_scale(image.rsun_arcsec, size, geometry)
    centre = (size + 1) / 2
    return replace(
        image,
        data=empty,
        crpix=(centre, centre),
        crval=(0.0, 0.0),
        cdelt=(scale, scale),
        rotation=((1.0, 0.0), (0.0, 1.0)),
    )


def canonical_header(facts: SolarImage, modality: str, unit: str, exposure: float | None = None) -> dict[str, object]:
    """FITS cards of a canonical image, such that `sunpy.map.Map((data, header))` knows its instrument.

    Args:
        facts: What `canonical_facts` gave for the image.
        modality: Name from `MODALITIES`.
        unit: Physical unit of the data, as `"DN"`, `"DN/s"` or `"G"`.
        exposure: Exposure in seconds that the data refer to; left out where None.

    Returns:
        Card names and values.

    Raises:
        SolarImageError: The facts carry no observation time (an array without a header).
    """
    if facts.time is None:
        raise SolarImageError(facts.source, "DATE-OBS", "an observation time", "none", "Give the image with a header.")
    start = facts.time - timedelta(seconds=(facts.exposure or 0) / 2)
    row = MODALITIES[modality]
    (pc11, pc12), (pc21, pc22) = facts.rotation
    header: dict[str, object] = {
        "WCSAXES": 2,
        "CTYPE1": "HPLN-TAN",
        "CTYPE2": "HPLT-TAN",
        "CUNIT1": "arcsec",
        "CUNIT2": "arcsec",
        "CRPIX1": facts.crpix[0],
        "CRPIX2": facts.crpix[1],
        "CRVAL1": facts.crval[0],
        "CRVAL2": facts.crval[1],
        "CDELT1": facts.cdelt[0],
        "CDELT2": facts.cdelt[1],
        "PC1_1": pc11,
        "PC1_2": pc12,
        "PC2_1": pc21,
        "PC2_2": pc22,
        "RSUN_OBS": facts.rsun_arcsec,
        "DATE-OBS": start.replace(tzinfo=None).isoformat(timespec="milliseconds"),
        "T_OBS": facts.time.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z",  # UTC, for HMI too
        "BUNIT": {"DN/s": "DN / s"}.get(unit, unit),
        "WAVELNTH": row.wavelength,
        "WAVEUNIT": "angstrom",
    }
    if row.instrument == "hmi":
        header |= {"TELESCOP": "SDO/HMI", "INSTRUME": "HMI_COMBINED", "CONTENT": "MAGNETOGRAM"}
    else:
        header |= {"TELESCOP": "SDO/AIA", "INSTRUME": str(facts.header.get("INSTRUME", "AIA"))}
    if exposure is not None:
        header["EXPTIME"] = exposure
    if facts.observer_distance is not None:
        header["DSUN_OBS"] = facts.observer_distance
    if facts.b0 is not None:
        header |= {"HGLN_OBS": 0.0, "HGLT_OBS": facts.b0, "CRLT_OBS": facts.b0}
    if facts.l0 is not None:
        header["CRLN_OBS"] = facts.l0
    return header


__all__ = [
    "GEOMETRIES",
    "PLATE_SCALE_1024",
    "RSUN_PIXELS_1024",
    "SUPPORT_RADIUS",
    "canonical_facts",
    "canonical_header",
    "canonical_scale",
    "disk_fraction",
    "disk_mask",
    "to_canonical",
]
