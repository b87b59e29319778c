"""The canonical grid against independent reprojections, and the limits of what it takes."""

import math
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from astropy.wcs import WCS
from reproject import reproject_exact
from scipy.ndimage import gaussian_filter, map_coordinates
from torch.nn import functional as F

from solarchip_hf.models.geometry import (
    RSUN_PIXELS_1024,
    SUPPORT_RADIUS,
    canonical_facts,
    canonical_header,
    disk_fraction,
    disk_mask,
    to_canonical,
)
from solarchip_hf.models.headers import SolarImage, SolarImageError
from solarchip_hf.models.readers import read_image
from solarchip_hf.models.resampling import affine_resample

SHIFT, CORRELATION, FLUX = 0.1, 0.999, 1e-3  # what the package promises against area-true references


def turn(degrees: float) -> np.ndarray:
    angle = math.radians(degrees)
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def solar_image(data: np.ndarray, **changes) -> SolarImage:
    """An AIA 171 image, centred, north up, whose disk has the canonical radius."""
    size = len(data)
    scale = 976.0 / (RSUN_PIXELS_1024 * size / 1024)
    facts = {
        "modality": "aia171", "source": "test", "instrument": "AIA", "time": datetime(2024, 10, 4, tzinfo=UTC),
        "time_nominal": None, "exposure": 2.0, "quality": 0, "near_real_time": False, "unit": "DN",
        "crpix": ((size + 1) / 2,) * 2, "crval": (0.0, 0.0), "cdelt": (scale, scale),
        "rotation": ((1.0, 0.0), (0.0, 1.0)), "rsun_arcsec": 976.0,
    }  # fmt: skip
    return SolarImage(data=data.astype(np.float32), **{**facts, **changes})


def turned_copy(image: SolarImage, degrees: float) -> SolarImage:
    """The same pixels under a header that says they are turned."""
    return replace(image, rotation=tuple(map(tuple, turn(degrees) @ np.array(image.rotation))))


def wcs_of(image: SolarImage, shape: tuple[int, int]) -> WCS:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype, wcs.wcs.cunit = ["RA---TAN", "DEC--TAN"], ["arcsec", "arcsec"]  # the projection, without a frame
    wcs.wcs.crpix, wcs.wcs.crval, wcs.wcs.cdelt = image.crpix, image.crval, image.cdelt
    wcs.wcs.pc = np.array(image.rotation)
    wcs.array_shape = shape
    return wcs


def exact_area(image: SolarImage, size: int, geometry: str = "rsun") -> np.ndarray:
    """Reference: reproject's spherical-polygon areas, by the header's TAN projection."""
    target = wcs_of(canonical_facts(image, size, geometry), (size, size))
    return reproject_exact((image.data, wcs_of(image, image.shape)), target, return_footprint=False)


def native_then_blocks(image: SolarImage, size: int) -> np.ndarray:
    """Reference: a cubic spline registers at native scale or finer, then blocks are averaged."""
    facts = canonical_facts(image, size, "rsun")
    blocks = max(2, math.ceil(facts.cdelt[0] / image.cdelt[0]))
    steps = ((np.arange(size * blocks) - (size * blocks - 1) / 2) / blocks * facts.cdelt[0])[:, None]
    world = np.diag(image.cdelt) @ np.array(image.rotation)
    inverse = np.linalg.inv(world)
    x, y = steps.T - image.crval[0], steps - image.crval[1]
    positions = [inverse[axis, 0] * x + inverse[axis, 1] * y + image.crpix[axis] - 1 for axis in (1, 0)]
    fine = map_coordinates(image.data, positions, order=3, mode="nearest")
    return fine.reshape(size, blocks, size, blocks).mean(axis=(1, 3))


def displacement(image: np.ndarray, reference: np.ndarray) -> float:
    """Pixels between two images, by the peak of their cross-correlation."""
    correlation = np.fft.ifft2(
        np.fft.fft2(reference - reference.mean()).conj() * np.fft.fft2(image - image.mean())
    ).real
    peak = np.unravel_index(correlation.argmax(), correlation.shape)
    offsets = []
    for axis, length in enumerate(correlation.shape):
        line = np.take(correlation, peak[1 - axis], axis=1 - axis)
        low, middle, high = (line[(peak[axis] + step) % length] for step in (-1, 0, 1))
        offsets.append((peak[axis] + 0.5 * (low - high) / (low - 2 * middle + high) + length / 2) % length - length / 2)
    return math.hypot(*offsets)


def agreement(image: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Displacement in px, correlation and relative flux difference on the disk."""
    disk = disk_mask(len(image))
    assert np.isfinite(image[disk]).all()
    assert np.isfinite(reference[disk]).all()
    # fine structure only: the mask's own edge, or a slow gradient cut by it, would hold the peak at zero
    inner = disk_mask(len(image), 0.95)
    logs = [np.log1p(np.maximum(np.nan_to_num(values), 0)) for values in (image, reference)]
    fine = [np.where(inner, values - gaussian_filter(values, 4), 0) for values in logs]
    flux = float(image[disk].sum(dtype=np.float64) / reference[disk].sum(dtype=np.float64)) - 1
    return displacement(*fine), float(np.corrcoef(image[disk], reference[disk])[0, 1]), abs(flux)


def assert_agrees(image: np.ndarray, reference: np.ndarray) -> None:
    shift, correlation, flux = agreement(image, reference)
    assert shift < SHIFT
    assert correlation > CORRELATION
    assert flux < FLUX


@pytest.mark.parametrize("channel", ["0171", "0304", "1700"])
def test_synoptic_files_agree_with_exact_areas(sdo_folder, channel):
    image = read_image(sdo_folder / f"AIAsynoptic{channel}.fits")
    assert_agrees(to_canonical(image, 256), exact_area(image, 256))


@pytest.mark.parametrize("channel", ["0193", "1700"])
def test_synoptic_files_agree_at_full_size(sdo_folder, channel):
    image = read_image(sdo_folder / f"AIAsynoptic{channel}.fits")
    assert_agrees(to_canonical(image, 1024), native_then_blocks(image, 1024))


@pytest.mark.parametrize("size", [64, 128])
def test_rebinned_level1_agrees_with_exact_areas(sdo_folder, size):
    image = read_image(sdo_folder / "aia_171_level1.fits")
    assert image.crval != (0, 0)
    assert image.rotation != ((1, 0), (0, 1))
    assert_agrees(to_canonical(image, size), exact_area(image, size))


@pytest.mark.parametrize("degrees", [180.0, 179.93])
def test_hmi_like_header_agrees_with_exact_areas(sdo_folder, degrees):
    image = read_image(sdo_folder / "AIAsynoptic0193.fits")
    image = turned_copy(replace(image, crpix=(515.3, 507.9), crval=(1.2, -2.3)), degrees)
    assert_agrees(to_canonical(image, 256), exact_area(image, 256))


def test_hmi_right_side_up(sdo_folder):
    """The same Sun through a camera that hangs upside down gives the same image."""
    image = read_image(sdo_folder / "AIAsynoptic0193.fits")
    hanging = replace(turned_copy(image, 180), data=image.data[::-1, ::-1])
    np.testing.assert_allclose(to_canonical(hanging, 1024), to_canonical(image, 1024), rtol=1e-4, atol=1e-2)


def test_4096_px_image_agrees_with_sunpy(sdo_folder):
    """A real 4096 px image under an HMI-like header; sunpy registers it at native scale, then blocks are averaged."""
    import sunpy.map

    image = read_image(sdo_folder / "2021_06_01__00_01_21_347__SDO_AIA_AIA_171.jp2")
    image = turned_copy(replace(image, crpix=(2051.3, 2044.6), crval=(0.0, 0.0)), 179.93)
    header = canonical_header(image, "aia171", "DN/s")
    registered = sunpy.map.Map(image.data, header).rotate(recenter=True, order=3, missing=0.0, method="scipy")
    reference = registered.data
    margin = (len(reference) - 4096) // 2
    reference = reference[margin : margin + 4096, margin : margin + 4096].reshape(1024, 4, 1024, 4).mean(axis=(1, 3))
    # sunpy's image keeps the plate scale: compare on the grid whose radius it then has
    same_scale = replace(image, rsun_arcsec=image.cdelt[0] * 4 * RSUN_PIXELS_1024)
    assert_agrees(to_canonical(same_scale, 1024), reference)


def test_a_planted_half_pixel_is_noticed(sdo_folder):
    image = read_image(sdo_folder / "AIAsynoptic0193.fits")
    right = to_canonical(image, 512)
    wrong = to_canonical(replace(image, crpix=(image.crpix[0] + 0.5, image.crpix[1] + 0.5)), 512)
    shift, *_ = agreement(wrong, right)
    planted = math.hypot(0.5, 0.5) * image.cdelt[0] / canonical_facts(image, 512, "rsun").cdelt[0]
    assert shift > 2 * SHIFT
    assert shift == pytest.approx(planted, rel=0.25)  # the parabola falls short of a sharp peak


@pytest.mark.parametrize("degrees", [0, 0.07, 30, 179.93])
@pytest.mark.parametrize("step", [0.7, 1.3, 2.4, 3.93, 9.5])
def test_every_filter_keeps_position_and_brightness(step, degrees):
    """A bright blob on a plateau: centroid and sum stay where the matrix says."""
    y, x = np.mgrid[:600, :600]
    width = 3 * max(step, 1)
    data = 5 + 100 * np.exp(-((x - 322.3) ** 2 + (y - 287.6) ** 2) / (2 * width**2))
    size = int(340 / step)
    matrix, origin = turn(degrees) * step, np.array([300.2, 299.4])
    result = affine_resample(data, matrix, origin, size).astype(np.float64)
    blob = result - 5
    offset = np.arange(size) - (size - 1) / 2
    centroid = np.array([(blob * offset).sum(), (blob * offset[:, None]).sum()]) / blob.sum()
    np.testing.assert_allclose(matrix @ centroid + origin, [322.3, 287.6], atol=0.02)
    assert blob.sum() * step**2 == pytest.approx(100 * 2 * math.pi * width**2, rel=1e-3)


def test_samples_add_up_to_the_area_integral_on_noise():
    """Pixel noise, where a sparse set of samples gives itself away."""
    noise = np.random.default_rng(1).normal(size=(1024, 1024)).astype(np.float32)
    for step, bound in ((1.9, 0.999), (3.93, 0.998), (4.7, 0.99)):
        size, origin = int(900 / step), np.array([511.2, 512.3])
        exact = affine_resample(noise, np.eye(2) * step, origin, size)
        sampled = affine_resample(noise, turn(0.001) * step, origin, size)  # turned by less than 0.01 px
        assert np.corrcoef(exact.ravel(), sampled.ravel())[0, 1] > bound


def test_nan_rules():
    data = np.full((512, 512), 7.0)
    data[:, :100] = np.nan  # half of output column 25 at a step of 4, with offset: see below
    data[300, 300] = np.inf
    result = affine_resample(data, np.eye(2) * 4, np.array([255.5, 255.5]), 128)
    assert np.isnan(result[:, :25]).all()
    assert np.all(result[:, 25:] == pytest.approx(7))
    shifted = affine_resample(data, np.eye(2) * 4, np.array([256.5, 255.5]), 128)  # column 24 covers pixels 97 to 100
    assert np.isnan(shifted[:, 24]).all()
    halved = affine_resample(data, np.eye(2) * 4, np.array([257.5, 255.5]), 128)  # column 24 covers pixels 98 to 101
    np.testing.assert_allclose(halved[:, 24], 7, rtol=1e-5)
    turned = affine_resample(data, turn(0.5) * 4, np.array([255.5, 255.5]), 128)
    finite = np.isfinite(turned)
    assert 0.15 < 1 - finite.mean() < 0.25
    np.testing.assert_allclose(turned[finite], 7, rtol=1e-5)


def test_outside_the_frame_is_invalid():
    image = solar_image(np.ones((256, 256)))
    shifted = replace(image, crpix=(image.crpix[0] + 64, image.crpix[1]))
    result = to_canonical(shifted, 128)
    assert np.isnan(result).mean() == pytest.approx(0.25, abs=0.01)
    assert np.isnan(result[:, -32:]).all()
    assert np.isfinite(result[:, :-33]).all()
    # the running means never reach across the frame's edge either
    turned = affine_resample(np.ones((400, 400)), turn(10) * 8, np.array([199.5, 199.5]), 64)
    assert np.nanmin(turned) == pytest.approx(1)
    assert np.nanmax(turned) == pytest.approx(1)


def test_identity_and_radius():
    data = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    np.testing.assert_array_equal(to_canonical(solar_image(data), 256), data)
    # a disk of 900 arcsec comes out with the radius of a disk of 976
    offset = np.arange(512) - 255.5
    radius = np.hypot(offset[:, None], offset) * (976 / (RSUN_PIXELS_1024 / 2))
    disk = solar_image(np.where(radius < 900, 1.0, 0.0), rsun_arcsec=900.0)
    assert to_canonical(disk, 512).sum() == pytest.approx(math.pi * (RSUN_PIXELS_1024 / 2) ** 2, rel=2e-3)
    assert to_canonical(disk, 512, "arcsec").sum() == pytest.approx(math.pi * (900 / 4.8) ** 2, rel=2e-3)


def test_arcsec_grid():
    image = solar_image(np.ones((128, 128)), rsun_arcsec=950.0)
    assert canonical_facts(image, 512, "arcsec").cdelt == (4.8, 4.8)
    assert canonical_facts(image, 1024, "rsun").cdelt[0] * RSUN_PIXELS_1024 == pytest.approx(950)


def test_masks():
    for size in (64, 257, 1024):
        mask = disk_mask(size)
        assert np.array_equal(mask, mask[::-1])
        assert np.array_equal(mask, mask.T)
        assert mask.mean() == pytest.approx(math.pi * (RSUN_PIXELS_1024 / 1024) ** 2, rel=0.02)
    circle = disk_mask(1024, SUPPORT_RADIUS)
    assert pytest.approx(1.259, abs=1e-3) == SUPPORT_RADIUS
    assert circle[511, 0]
    assert not circle[0, 0]
    fraction = disk_fraction(1024, 16)
    assert fraction.shape == (16, 16)
    assert fraction.mean() == pytest.approx(disk_mask(1024).mean())
    assert fraction[8, 8] == 1
    assert fraction[0, 0] == 0
    assert fraction[0, 8] == disk_mask(1024)[:64, 512:576].mean()
    with pytest.raises(ValueError, match="grid: expected a divisor of size 100"):
        disk_fraction(100, 16)


def test_affine_stands_for_tan():
    """The header's gnomonic projection departs from the affine map by less than 0.02 px at the limb."""
    image = solar_image(np.ones((4096, 4096)), cdelt=(0.6, 0.6), crval=(30.0, -20.0), crpix=(2051.0, 2040.0))
    angles = np.linspace(0, 2 * np.pi, 90)
    limb = np.stack([976 * np.cos(angles), 976 * np.sin(angles)], axis=1) / 3600
    pixels = wcs_of(image, image.shape).wcs_world2pix(limb, 1)
    affine = np.array(image.crpix) + (limb * 3600 - np.array(image.crval)) / 0.6
    assert 0 < np.abs(pixels - affine).max() < 0.02


def test_none_is_the_published_resize():
    data = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
    data[:40] = np.nan
    result = to_canonical(solar_image(data, rotation=((-1.0, 0.0), (0.0, -1.0))), 128, "none")
    filled = torch.from_numpy(np.nan_to_num(data))[None, None]
    expected = F.interpolate(filled, (128, 128), mode="bilinear", antialias=True)[0, 0].numpy()
    np.testing.assert_allclose(np.nan_to_num(result), expected, atol=1e-6)
    assert np.isnan(result[:15]).all()
    assert np.isfinite(result[18:]).all()


def test_header_puts_the_image_back(sdo_folder):
    """The facts of the canonical image lead to the same image again, and to the same places on the sky."""
    image = read_image(sdo_folder / "AIAsynoptic0171.fits")
    for geometry in ("rsun", "arcsec"):
        canonical = to_canonical(image, 512, geometry)
        facts = canonical_facts(image, 512, geometry)
        np.testing.assert_array_equal(to_canonical(replace(facts, data=canonical), 512, geometry), canonical)
        sky = WCS({**canonical_header(facts, "aia171", "DN"), "NAXIS": 2}).wcs_pix2world([[256.5, 256.5]], 1)
        np.testing.assert_allclose((sky + 180) % 360 - 180, 0, atol=1e-9)
    resized = canonical_facts(image, 256, "none")
    before, after = wcs_of(image, image.shape), wcs_of(resized, (256, 256))
    np.testing.assert_allclose(after.wcs_pix2world([[0.5, 0.5]], 1), before.wcs_pix2world([[0.5, 0.5]], 1), atol=1e-9)


def test_what_cannot_be_placed_is_refused():
    image = solar_image(np.ones((64, 64)))
    with pytest.raises(SolarImageError, match="RSUN_OBS"):
        to_canonical(replace(image, rsun_arcsec=0.0), 64)
    with pytest.raises(SolarImageError, match="CDELT1"):
        to_canonical(replace(image, cdelt=(0.0, 2.4)), 64)
    with pytest.raises(SolarImageError, match="CRPIX"):
        to_canonical(replace(image, crpix=(math.nan, 1.0)), 64)
    with pytest.raises(SolarImageError, match="square"):
        to_canonical(replace(image, data=image.data[:32]), 64, "none")
    with pytest.raises(ValueError, match="geometry: expected one of rsun, arcsec, none"):
        to_canonical(image, 64, "carrington")
    with pytest.raises(SolarImageError, match="DATE-OBS"):
        canonical_header(replace(image, time=None), "aia171", "DN")
