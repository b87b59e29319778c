"""Fidelity of one generated solar image against the observed one: arrays in, numbers out, NaN where undefined.

NumPy, SciPy and scikit-image only, no import from the package: the `evaluate` library copies this file beside the
metric module. Images are in physical units on the canonical grid: square, north up, the disk's centre at (N - 1) / 2,
invalid pixels NaN. A pixel counts where both images are finite.
"""

from functools import lru_cache

import numpy as np
from scipy.ndimage import binary_erosion

# Solar radius over the side of the image on the canonical grid (406.67 px at 1024 px).
RADIUS_SHARE = 406.67 / 1024
# Share of the radius within which structure on the disk is compared: nearer the limb, projection spoils the profile.
INNER_SHARE = 0.95
# Annuli of the radial profile, in solar radii; at least a pixel wide.
ANNULUS = 0.025
# Side of scikit-image's window for structural similarity, its default.
WINDOW = 7
# Wavelengths in solar radii that part coarse, middle and fine structure.
COARSE, FINE = 0.4, 0.2
# A ratio of power below this is rounding error: the image has no structure at all.
NO_POWER = 1e-12
# Share of the truth that an error stays within, for PPE10 (Galvez et al. 2019).
PERCENT_10 = 0.1

# What PSNR and SSIM are told to be the range of the data. AIA: upper end of the public quick-look scales of
# Helioviewer in DN/s times the nominal exposure, in DN; 4500 has none: the saturation of the detector. HMI: 500 G,
# since a range of thousands of gauss calls an empty magnetogram excellent.
DATA_RANGES = {
    "hmi": 500.0,
    "aia94": 87.0,
    "aia131": 1450.0,
    "aia171": 3132.0,
    "aia193": 5000.0,
    "aia211": 4350.0,
    "aia304": 725.0,
    "aia335": 232.0,
    "aia1600": 1160.0,
    "aia1700": 5000.0,
    "aia4500": 16383.0,
}

IMAGE_SCORES = (
    "correlation_disk",
    "correlation",
    "ccc_disk",
    "ccc",
    "rmse",
    "mae",
    "nmse",
    "psnr",
    "ssim",
    "power_coarse_db",
    "power_fine_db",
)
INTENSITY_SCORES = ("flux_error", "flux_error_abs", "ppe10")


@lru_cache(maxsize=8)
def radial_distance(size: int, radius: float | None = None) -> np.ndarray:
    """Distance of every pixel from the disk's centre in solar radii.

    Args:
        size: Pixels on a side.
        radius: Solar radius in pixels; by default that of the canonical grid.

    Returns:
        (size, size) float64, read-only.
    """
    offset = np.arange(size) - (size - 1) / 2
    distance = np.hypot(offset[:, None], offset[None, :]) / (radius or RADIUS_SHARE * size)
    distance.setflags(write=False)
    return distance


def pearson(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Pearson's correlation of two equally long sets of finite numbers; NaN where one of them is constant."""
    first, second = prediction - prediction.mean(), reference - reference.mean()
    scale = np.sqrt((first**2).sum() * (second**2).sum())
    # a constant image leaves rounding errors of its mean behind
    floor = 1e-12 * np.sqrt((prediction**2).sum() * (reference**2).sum())
    return float((first * second).sum() / scale) if scale > floor else float("nan")


def concordance(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Lin's concordance correlation coefficient, 2 cov / (var + var + (difference of means)^2).

    Source: Lin 1989, Biometrics 45, 255, with moments over n.

    Args:
        prediction: (P,) finite.
        reference: (P,) finite.

    Returns:
        1 for equality; NaN where both are one and the same constant.
    """
    first, second = prediction.mean(), reference.mean()
    covariance = ((prediction - first) * (reference - second)).mean()
    scale = prediction.var() + reference.var() + (first - second) ** 2
    return float(2 * covariance / scale) if scale > 0 else float("nan")


def remove_radial_profile(image: np.ndarray, region: np.ndarray, radius: float | None = None) -> np.ndarray:
    """Subtracts from an image its own mean in annuli about the disk's centre.

    The quiet disk is alike on every day: unrelated images correlate by .7 over the frame for its sake alone.

    Args:
        image: (N, N).
        region: (N, N) bool, finite pixels to be kept.
        radius: Solar radius in pixels; by default that of the canonical grid.

    Returns:
        (P,) float64, the P pixels of the region in row-major order.
    """
    pixel = 1 / (radius or RADIUS_SHARE * len(image))
    annulus = (radial_distance(len(image), radius)[region] / max(ANNULUS, pixel)).astype(np.int64)
    values = image[region].astype(np.float64)
    total, count = np.bincount(annulus, weights=values), np.bincount(annulus)
    return values - (total / np.maximum(count, 1))[annulus]


def similarity_map(prediction: np.ndarray, reference: np.ndarray, data_range: float) -> tuple[np.ndarray, np.ndarray]:
    """Structural similarity around every pixel.

    Source: Wang et al. 2004, IEEE Transactions on Image Processing 13, 600, as scikit-image computes it by default.

    Args:
        prediction: (N, N).
        reference: (N, N).
        data_range: Span of the data that the constants of the index refer to.

    Returns:
        (N, N) float64 similarity, and (N, N) bool where the whole window is valid: elsewhere it means nothing.

    Raises:
        ImportError: scikit-image is not installed.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError("SSIM needs scikit-image: pip install 'solarchip_hf[translation]'.") from error

    valid = np.isfinite(prediction) & np.isfinite(reference)
    filled = [np.where(valid, image, 0).astype(np.float64) for image in (prediction, reference)]
    _, similarity = structural_similarity(*filled, data_range=data_range, win_size=WINDOW, full=True)
    return similarity, binary_erosion(valid, np.ones((WINDOW, WINDOW), dtype=bool))


def power_ratios(
    prediction: np.ndarray, reference: np.ndarray, region: np.ndarray, radius: float | None = None
) -> dict[str, float]:
    """Power of the structure on the disk over that of the truth in decibel, in coarse and in fine structure.

    Below 0 the image is too smooth (a regression's mean), above 0 it has structure that the truth lacks.

    Args:
        prediction: (N, N).
        reference: (N, N).
        region: (N, N) bool, finite pixels on the disk.
        radius: Solar radius in pixels; by default that of the canonical grid.

    Returns:
        `power_coarse_db` at wavelengths beyond 0.4 solar radii, `power_fine_db` below 0.2; NaN without any.
    """
    size = len(region)
    # The whole plane: of half of it, the waves along the axes would count twice and all others once.
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None, :])
    frequency = frequency * (radius or RADIUS_SHARE * size)  # cycles per solar radius
    power = []
    for image in (prediction, reference):
        flat = np.zeros((size, size))
        flat[region] = remove_radial_profile(image, region, radius)
        power.append(np.abs(np.fft.fft2(flat)) ** 2)
    ratios = {}
    for name, band in {
        "power_coarse_db": (frequency > 0) & (frequency < 1 / COARSE),
        "power_fine_db": frequency > 1 / FINE,
    }.items():
        ratio = _ratio(float(power[0][band].sum()), float(power[1][band].sum()))
        ratios[name] = float(10 * np.log10(ratio)) if ratio > NO_POWER else float("nan")
    return ratios


def image_scores(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    data_range: float,
    radius: float | None = None,
) -> dict[str, float]:
    """The scores of any channel.

    Args:
        prediction: (N, N) physical units, NaN where there is none.
        reference: (N, N) the truth.
        data_range: For PSNR and SSIM.
        radius: Solar radius in pixels; by default that of the canonical grid.

    Returns:
        `IMAGE_SCORES`: correlation and concordance over the frame and, named `_disk`, within 0.95 R with each image's
        own radial profile removed; RMSE, MAE, NMSE (squared error over squared truth: 1 for the zero field), PSNR and
        SSIM over the frame; ratios of power. NaN where undefined.
    """
    valid = np.isfinite(prediction) & np.isfinite(reference)
    if not valid.any():
        return dict.fromkeys(IMAGE_SCORES, float("nan"))
    first, second = (image[valid].astype(np.float64) for image in (prediction, reference))
    error = first - second
    mean_square = float((error**2).mean())
    scores = {
        "correlation": pearson(first, second),
        "ccc": concordance(first, second),
        "rmse": float(np.sqrt(mean_square)),
        "mae": float(np.abs(error).mean()),
        "nmse": _ratio(mean_square, float((second**2).mean())),
        "psnr": float(10 * np.log10(data_range**2 / mean_square)) if mean_square > 0 else float("inf"),
    }
    similarity, whole = similarity_map(prediction, reference, data_range)
    scores["ssim"] = float(similarity[whole].mean()) if whole.any() else float("nan")
    inner = valid & (radial_distance(len(reference), radius) < INNER_SHARE)
    if inner.any():
        flat = [remove_radial_profile(image, inner, radius) for image in (prediction, reference)]
        scores |= {"correlation_disk": pearson(*flat), "ccc_disk": concordance(*flat)}
        scores |= power_ratios(prediction, reference, inner, radius)
    return {name: scores.get(name, float("nan")) for name in IMAGE_SCORES}


def intensity_scores(prediction: np.ndarray, reference: np.ndarray, *, radius: float | None = None) -> dict[str, float]:
    """The scores of a channel without sign: total flux over the frame, and the share of nearly right pixels.

    Source: Galvez et al. 2019, ApJS 242, 7.

    Args:
        prediction: (N, N) physical units, NaN where there is none.
        reference: (N, N) the truth.
        radius: Solar radius in pixels; by default that of the canonical grid.

    Returns:
        `flux_error`, (sum of prediction - sum of truth) / sum of truth, `flux_error_abs`, its magnitude, and `ppe10`,
        the share of the disk's pixels that are within 10% of the truth.
    """
    valid = np.isfinite(prediction) & np.isfinite(reference)
    first, second = (image[valid].astype(np.float64) for image in (prediction, reference))
    flux = _ratio(float(first.sum() - second.sum()), float(second.sum()))
    disk = radial_distance(len(reference), radius)[valid] < 1
    return {"flux_error": flux, "flux_error_abs": abs(flux), "ppe10": share_within(first[disk], second[disk])}


def share_within(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Share of pixels within 10% of the truth; NaN where there are none."""
    if not reference.size:
        return float("nan")
    return float((np.abs(prediction - reference) <= PERCENT_10 * np.abs(reference)).mean())


def _ratio(above: float, below: float) -> float:
    return above / below if below != 0 else float("nan")


__all__ = [
    "DATA_RANGES",
    "IMAGE_SCORES",
    "INNER_SHARE",
    "INTENSITY_SCORES",
    "RADIUS_SHARE",
    "concordance",
    "image_scores",
    "intensity_scores",
    "pearson",
    "power_ratios",
    "radial_distance",
    "remove_radial_profile",
    "share_within",
    "similarity_map",
]
