"""Fidelity of a generated magnetogram: what is left to say where a correlation and a similarity flatter.

NumPy and SciPy only, no import from the package: the `evaluate` library copies this file beside the metric module.
Less than 1% of the disk has a field above 100 G, and an ultraviolet image carries no polarity: the zero field, Hale's
law and the truth with its sign reversed are what a magnetogram from AIA has to be compared with.
"""

import numpy as np
from scipy.ndimage import distance_transform_edt, label

from .image_scores import pearson, radial_distance, share_within, similarity_map

# Line-of-sight field in gauss from which a pixel counts as strong.
STRONG_FIELD = 100.0
# Strong pixels nearer than twice this, in solar radii, belong to one active region.
REGION_REACH = 0.04

MAGNETOGRAM_SCORES = (
    "unsigned_flux_error",
    "unsigned_flux_error_abs",
    "polarity_agreement",
    "polarity_agreement_hale",
    "polarity_gain_over_hale",
    "correlation_strong",
    "rmse_strong",
    "ppe10_strong",
    "ssim_strong",
    "ssim_zero",
    "ssim_strong_zero",
    "rmse_gain_over_zero",
    "ssim_gain_over_zero",
    "ssim_strong_gain_over_zero",
)


def polarity_agreement(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Share of pixels whose sign is right; a field of zero, which takes no side, counts half.

    Args:
        prediction: (P,) field.
        reference: (P,) field that is nowhere zero, as where it is strong.

    Returns:
        0 to 1, .5 by chance; NaN without pixels.
    """
    if not reference.size:
        return float("nan")
    return float((1 + np.sign(prediction) * np.sign(reference)).mean() / 2)


def hale_polarity(
    magnetogram: np.ndarray, *, northern_leader: int, b0: float = 0.0, radius: float | None = None
) -> np.ndarray:
    """The polarity that Hale's law gives active regions of which only place and strength are known.

    Strong pixels that lie near one another are a region; it is parted at its flux-weighted central column into a leader
    in the west and a follower in the east. The leader's sign is that of the cycle in the north, the opposite in the
    south (Hale et al. 1919, ApJ 49, 153). Tilt and complexity are left out.

    Args:
        magnetogram: (N, N) field in gauss, north up, west to the right; only its magnitude is used.
        northern_leader: +1 or -1, polarity of northern leaders: -1 in cycle 24, +1 in cycle 25.
        b0: Heliographic latitude of the disk's centre in degrees.
        radius: Solar radius in pixels; by default that of the canonical grid.

    Returns:
        (N, N) float64: +1 or -1 within reach of a region, else 0.
    """
    if northern_leader not in (-1, 1):
        raise ValueError(f"northern_leader: expected +1 or -1, got {northern_leader!r}.")
    size = len(magnetogram)
    distance = radial_distance(size, radius)
    pixel = float(distance[0, 0]) / (np.hypot(size - 1, size - 1) / 2)  # solar radii
    strength = np.nan_to_num(np.abs(magnetogram))
    strong = (strength > STRONG_FIELD) & (distance < 1)
    near = distance_transform_edt(~strong) * pixel <= max(REGION_REACH, pixel) if strong.any() else strong
    regions, count = label(near, np.ones((3, 3)))
    offset = (np.arange(size) - (size - 1) / 2) * pixel
    columns = np.broadcast_to(offset, (size, size))
    height = np.sqrt(np.clip(1 - distance**2, 0, None))
    sine = offset[:, None] * np.cos(np.radians(b0)) + height * np.sin(np.radians(b0))  # of the latitude
    flux = np.where(strong, strength, 0)
    total, column, latitude = (
        np.bincount(regions.ravel(), weights=(flux * factor).ravel(), minlength=count + 1)
        for factor in (1.0, columns, sine)
    )
    total[0] = 1  # label 0 is where there is no region, without any flux
    hemisphere = np.where(latitude >= 0, 1, -1)[regions]
    west = np.where(columns >= (column / total)[regions], 1, -1)
    return np.where(regions > 0, west * hemisphere * northern_leader, 0).astype(np.float64)


def magnetogram_scores(
    prediction: np.ndarray,
    reference: np.ndarray,
    *,
    data_range: float = 500.0,
    northern_leader: int = -1,
    b0: float = 0.0,
    radius: float | None = None,
) -> dict[str, float]:
    """The scores of a magnetogram that rest on its strong field, and its gain over the zero field.

    Args:
        prediction: (N, N) gauss, NaN where there is none.
        reference: (N, N) the truth, NaN off the disk.
        data_range: For SSIM.
        northern_leader: As for `hale_polarity`.
        b0: As for `hale_polarity`.
        radius: Solar radius in pixels; by default that of the canonical grid.

    Returns:
        `MAGNETOGRAM_SCORES`. Strong is where the truth is above 100 G, on the disk. `unsigned_flux_error` is relative,
        over the disk. `polarity_agreement_hale` is what Hale's law reaches on the very regions of the truth.
        `rmse_gain_over_zero` is 1 - RMSE / RMSE of the zero field; the gains of SSIM are differences. NaN where
        undefined, as without any strong pixel.
    """
    distance = radial_distance(len(reference), radius)
    valid = np.isfinite(prediction) & np.isfinite(reference) & (distance < 1)
    strong = valid & (np.abs(np.nan_to_num(reference)) > STRONG_FIELD)
    nothing = np.where(np.isfinite(prediction), 0.0, np.nan)
    similarity, whole = similarity_map(prediction, reference, data_range)
    similarity_zero, _ = similarity_map(nothing, reference, data_range)
    first, second = (image[valid].astype(np.float64) for image in (prediction, reference))
    hale = hale_polarity(reference, northern_leader=northern_leader, b0=b0, radius=radius)
    flux = _relative(np.abs(first).sum(), np.abs(second).sum())
    agreement = polarity_agreement(prediction[strong], reference[strong])
    prior = polarity_agreement(hale[strong], reference[strong])
    scores = {
        "unsigned_flux_error": flux,
        "unsigned_flux_error_abs": abs(flux),
        "polarity_agreement": agreement,
        "polarity_agreement_hale": prior,
        "polarity_gain_over_hale": agreement - prior,
        "rmse_gain_over_zero": 0.0 - _relative(np.sqrt(((first - second) ** 2).sum()), np.sqrt((second**2).sum())),
        "ssim_zero": _mean(similarity_zero[whole]),
        "ssim_strong": _mean(similarity[whole & strong]),
        "ssim_strong_zero": _mean(similarity_zero[whole & strong]),
        "ssim_gain_over_zero": _mean(similarity[whole]) - _mean(similarity_zero[whole]),
        "ssim_strong_gain_over_zero": _mean(similarity[whole & strong]) - _mean(similarity_zero[whole & strong]),
    }
    if strong.any():
        first, second = (image[strong].astype(np.float64) for image in (prediction, reference))
        scores["correlation_strong"] = pearson(first, second)
        scores["rmse_strong"] = float(np.sqrt(((first - second) ** 2).mean()))
        scores["ppe10_strong"] = share_within(first, second)
    return {name: scores.get(name, float("nan")) for name in MAGNETOGRAM_SCORES}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _relative(value: float, reference: float) -> float:
    """(value - reference) / reference."""
    return float(value / reference - 1) if reference > 0 else float("nan")


__all__ = ["MAGNETOGRAM_SCORES", "STRONG_FIELD", "hale_polarity", "magnetogram_scores", "polarity_agreement"]
