"""What the spread of an ensemble of generated images is worth: arrays in, numbers out, NaN where undefined.

NumPy only, no import from the package: the `evaluate` library copies this file beside the metric module.
"""

import numpy as np

from .image_scores import INNER_SHARE, pearson, radial_distance

ENSEMBLE_SCORES = ("crps", "spread_skill", "spread_error_ratio", "coverage")
CENTRAL = 0.8


def crps(samples: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of every pixel, in the fair form for an ensemble of m members.

    mean |x_i - y| - sum |x_i - x_j| / (2 m (m - 1)), whose expectation does not depend on m. Source: Gneiting and
    Raftery 2007, JASA 102, 359; Ferro 2014, QJRMS 140, 1917.

    Args:
        samples: (m, P), m of 2 or more.
        reference: (P,).

    Returns:
        (P,) in the unit of the samples; 0 is perfect, for one sharp value it is the absolute error.
    """
    members = len(samples)
    if members < 2:
        raise ValueError(f"samples: expected 2 or more members, got {members}; their spread is what is scored.")
    ordered = np.sort(samples, axis=0)
    weights = 2 * np.arange(members) - members + 1  # sum over pairs of the differences of sorted values
    pairs = np.tensordot(weights, ordered, axes=1)
    return np.abs(samples - reference).mean(axis=0) - pairs / (members * (members - 1))


def central_interval(members: int, share: float = CENTRAL) -> tuple[int, float]:
    """The central interval between order statistics that comes nearest to a share, and its exact expected coverage.

    Where truth and samples are alike, the truth falls between the k-th smallest and the k-th largest of m samples with
    probability (m + 1 - 2 k) / (m + 1), whatever the distribution. Few samples have no interval of 80%: 8 of them span
    .78 from end to end, 9 span .8.

    Args:
        members: m, 2 or more.
        share: Wanted coverage.

    Returns:
        `(k, expected)`.
    """
    if members < 2:
        raise ValueError(f"members: expected 2 or more, got {members}.")
    k = min(max(1, round((1 - share) / 2 * (members + 1))), members // 2)
    return k, (members + 1 - 2 * k) / (members + 1)


def ensemble_spread(samples: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviation of the members (m - 1), and their mean's error, pixel by pixel.

    Args:
        samples: (..., m, H, H), m of 2 or more.
        reference: (..., H, H).

    Returns:
        Spread and signed error, each (..., H, H); NaN where a member or the truth is.
    """
    error = samples.mean(axis=-3, dtype=np.float64) - reference
    return samples.std(axis=-3, ddof=1, dtype=np.float64), error


def ensemble_scores(
    samples: np.ndarray, reference: np.ndarray, *, radius: float | None = None, share: float = CENTRAL
) -> dict[str, float]:
    """The scores of m samples of one image, over the pixels at which all of them and the truth are finite.

    Args:
        samples: (m, N, N) physical units.
        reference: (N, N) the truth.
        radius: Solar radius in pixels; by default that of the canonical grid.
        share: Of the central interval.

    Returns:
        `crps` over the frame; `spread_skill`, the correlation over the disk's pixels within 0.95 R between the samples'
        standard deviation and the error of their mean; `spread_error_ratio`, the root of the mean variance, times
        ((m + 1) / m)^.5, over the RMSE of the mean: 1 where the spread is as large as the error (Fortin et al. 2014, J.
        Hydrometeorology 15, 1708); `coverage` of the interval of `central_interval`, over the frame.
    """
    valid = np.isfinite(reference) & np.isfinite(samples).all(axis=0)
    if not valid.any():
        return dict.fromkeys(ENSEMBLE_SCORES, float("nan"))
    members = len(samples)
    drawn, truth = samples[:, valid].astype(np.float64), reference[valid].astype(np.float64)
    spread, error = (values[valid] for values in ensemble_spread(samples, reference))
    inner = radial_distance(len(reference), radius)[valid] < INNER_SHARE
    k, _ = central_interval(members, share)
    ordered = np.sort(drawn, axis=0)
    root = np.sqrt((error**2).mean())
    return {
        "crps": float(crps(drawn, truth).mean()),
        "spread_skill": pearson(spread[inner], np.abs(error[inner])) if inner.any() else float("nan"),
        "spread_error_ratio": (
            float(np.sqrt((spread**2).mean() * (members + 1) / members) / root) if root > 0 else float("nan")
        ),
        "coverage": float(((truth >= ordered[k - 1]) & (truth <= ordered[members - k])).mean()),
    }


__all__ = ["CENTRAL", "ENSEMBLE_SCORES", "central_interval", "crps", "ensemble_scores", "ensemble_spread"]
