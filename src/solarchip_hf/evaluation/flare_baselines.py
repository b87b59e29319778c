"""What a flare forecast has to beat: climatology, cycle phase, persistence, flare history, magnetogram statistics.

Every baseline has `fit(features, labels)` and `predict_proba(features)`, takes a DataFrame of features (`past_*` of
`solarchip_hf.data`, or `magnetogram_statistics`) and returns (N, 4) probabilities of 0AB, C, M, X.
"""

from importlib import import_module
from typing import Any

import numpy as np
import pandas as pd
from scipy import ndimage

from ..models.geometry import RSUN_PIXELS_1024
from .flare_skill.skill_scores import CLASS_NAMES, exceedance

_CLASSES = len(CLASS_NAMES)
_SOLAR_RADIUS_CM = 6.957e10  # IAU 2015 nominal solar radius
_LARGEST_ANGLE = 70.0  # degrees from disk centre; beyond, foreshortening and noise rule the line-of-sight field


def classes_from_exceedance(above: Any) -> np.ndarray:
    """Turns probabilities of C+, M+, X+ into those of the classes; a rarer event never gets more than a commoner one.

    Args:
        above: (N, K - 1) float.

    Returns:
        (N, K) float64, rows sum to 1.
    """
    above = np.minimum.accumulate(np.asarray(above, dtype=float).clip(0, 1), axis=1)
    padded = np.concatenate([np.ones((len(above), 1)), above, np.zeros((len(above), 1))], axis=1)
    return padded[:, :-1] - padded[:, 1:]


class _Baseline:
    """Keeps the training part's class frequencies, the fallback of every baseline."""

    columns: tuple[str, ...] = ()

    def fit(self, features: pd.DataFrame, labels: Any) -> "_Baseline":
        """Fits on the training part.

        Args:
            features: A row a sample.
            labels: (N,) classes 0..3; unknown windows (-1) have to be dropped before.

        Returns:
            Itself.

        Raises:
            ValueError: Unknown labels, no sample, lengths that differ, missing columns or values.
        """
        labels = np.asarray(labels)
        if len(labels) != len(features) or not len(labels):
            raise ValueError(
                f"expected a label a row and at least one, got {len(features)} rows, {len(labels)} labels."
            )
        if not np.isin(labels, range(_CLASSES)).all():
            raise ValueError("labels: expected classes 0..3; drop unknown windows (label -1) first.")
        self.frequencies_ = np.bincount(labels.astype(int), minlength=_CLASSES) / len(labels)
        self._fit(features, labels.astype(int))
        return self

    def _fit(self, features: pd.DataFrame, labels: np.ndarray) -> None:
        pass

    def _matrix(self, features: pd.DataFrame) -> np.ndarray:
        """(N, columns) float64 of the features in use, all of them known."""
        names = list(self.columns)
        absent = [name for name in names if name not in features]
        if absent:
            raise ValueError(f"{type(self).__name__}: expected the features {absent}, got {list(features)}.")
        matrix = features[names].to_numpy(dtype=float, na_value=np.nan)
        unknown = ~np.isfinite(matrix).all(axis=1)
        if unknown.any():
            raise ValueError(
                f"{type(self).__name__}: expected every feature to be known, got {int(unknown.sum())} of {len(matrix)} "
                "rows with missing values (no history yet, or no coverage); drop these rows for all forecasts alike."
            )
        return matrix


class ClimatologyBaseline(_Baseline):
    """The training part's class frequencies, always."""

    def predict_proba(self, features: pd.DataFrame) -> np.ndarray:
        """(N, 4) float64, the same row N times."""
        return np.tile(self.frequencies_, (len(features), 1))


class TrailingRateBaseline(_Baseline):
    """The share of flaring days among the last 365: knows the phase of the solar cycle, and nothing of today's Sun.

    Features: `past_c_days_365d, past_m_days_365d, past_x_days_365d` of `trailing_day_rates`. Nothing is fitted.
    """

    columns = ("past_c_days_365d", "past_m_days_365d", "past_x_days_365d")

    def predict_proba(self, features: pd.DataFrame) -> np.ndarray:
        """(N, 4) float64."""
        return classes_from_exceedance(self._matrix(features))


class PersistenceBaseline(_Baseline):
    """The class of the last 24 hours holds for the next.

    Args:
        calibrated: Give the class frequencies that followed that class in the training part (half a count of the
            climatology is added) rather than certainty.
    """

    columns = ("past_label_1d",)

    def __init__(self, calibrated: bool = True):
        self.calibrated = calibrated

    def _fit(self, features: pd.DataFrame, labels: np.ndarray) -> None:
        before = self._matrix(features)[:, 0].astype(int)
        counts = np.zeros((_CLASSES, _CLASSES))
        np.add.at(counts, (before, labels), 1)
        counts += 0.5 * self.frequencies_
        self.transitions_ = counts / counts.sum(axis=1, keepdims=True)

    def predict_proba(self, features: pd.DataFrame) -> np.ndarray:
        """(N, 4) float64; rows of 0 and 1 unless calibrated."""
        before = self._matrix(features)[:, 0].astype(int)
        return (self.transitions_ if self.calibrated else np.eye(_CLASSES))[before]


class PastRateLogisticBaseline(_Baseline):
    """Logistic regression of C+, M+ and X+ on what flared in the last 1, 3, 7 and 27 days: a model without an image.

    Rates enter as log(1 + rate), every feature standardised on the training part.

    Args:
        columns: Features to use; by default every `past_*` column of the training table but labels, which the largest
            flux already holds.
        regularization: Inverse strength of the L2 penalty, scikit-learn's `C`.

    Raises:
        ImportError: scikit-learn is not installed.
    """

    def __init__(self, columns: tuple[str, ...] = (), regularization: float = 1.0):
        self.columns, self.regularization = tuple(columns), regularization
        self._chosen = bool(columns)

    def _fit(self, features: pd.DataFrame, labels: np.ndarray) -> None:
        logistic = _sklearn("linear_model").LogisticRegression
        if not self._chosen:
            self.columns = tuple(n for n in features if n.startswith("past_") and "_label_" not in n)
        matrix = self._transform(features)
        self.mean_, self.scale_ = matrix.mean(axis=0), np.maximum(matrix.std(axis=0), 1e-12)
        matrix = (matrix - self.mean_) / self.scale_
        self.models_: list[Any] = []
        for boundary in range(1, _CLASSES):
            reached = labels >= boundary
            if reached.all() or not reached.any():
                self.models_.append(float(reached.mean()))  # nothing to learn from: the frequency itself
            else:
                self.models_.append(logistic(C=self.regularization, max_iter=2000).fit(matrix, reached))

    def _transform(self, features: pd.DataFrame) -> np.ndarray:
        matrix = self._matrix(features).copy()  # it may be a read-only view of the table
        rates = np.array(["_rate_" in name for name in self.columns])
        matrix[:, rates] = np.log1p(matrix[:, rates])
        return matrix

    def predict_proba(self, features: pd.DataFrame) -> np.ndarray:
        """(N, 4) float64."""
        matrix = (self._transform(features) - self.mean_) / self.scale_
        above = [
            np.full(len(matrix), model) if isinstance(model, float) else model.predict_proba(matrix)[:, 1]
            for model in self.models_
        ]
        return classes_from_exceedance(np.stack(above, axis=1))


class MagnetogramForestBaseline(_Baseline):
    """Random forest on a few statistics of the magnetogram, which often beats a weak network.

    Args:
        columns: Features to use; by default every column of the training table.
        num_trees: Number of trees.
        min_samples_leaf: Fewest samples in a leaf; large leaves give smooth probabilities.
        seed: Of the forest.

    Raises:
        ImportError: scikit-learn is not installed.
    """

    def __init__(self, columns: tuple[str, ...] = (), num_trees: int = 300, min_samples_leaf: int = 10, seed: int = 0):
        self.columns, self.num_trees = tuple(columns), num_trees
        self.min_samples_leaf, self.seed = min_samples_leaf, seed
        self._chosen = bool(columns)

    def _fit(self, features: pd.DataFrame, labels: np.ndarray) -> None:
        if not self._chosen:
            self.columns = tuple(features)
        self.forest_ = _sklearn("ensemble").RandomForestClassifier(
            n_estimators=self.num_trees,
            min_samples_leaf=self.min_samples_leaf,
            max_features="sqrt",
            random_state=self.seed,
        )
        self.forest_.fit(self._matrix(features), labels)

    def predict_proba(self, features: pd.DataFrame) -> np.ndarray:
        """(N, 4) float64; a class that the training part lacks gets 0."""
        probabilities = np.zeros((len(features), _CLASSES))
        probabilities[:, self.forest_.classes_] = self.forest_.predict_proba(self._matrix(features))
        return classes_from_exceedance(exceedance(probabilities))


def magnetogram_statistics(
    magnetograms: Any, *, noise: float = 30.0, strong: float = 100.0, index: Any = None
) -> pd.DataFrame:
    """Flux, area, gradients and polarity inversion lines of full-disk magnetograms, within 70 degrees of the centre.

    The field is taken as radial (B = B_los / mu) and areas are those on the sphere. Gradients are in the plane of the
    sky, not corrected for foreshortening. A polarity inversion line (PIL) is where the one-pixel surroundings of
    strong positive and strong negative field overlap (Schrijver 2007, ApJ 655, L117, who has 150 G on MDI).

    Args:
        magnetograms: (N, N) or (T, N, N) line-of-sight field in gauss on the canonical `rsun` grid (R = 406.67 N / 1024
            px, disk centre at (N - 1) / 2), NaN where invalid, as the processor's `to_physical` gives.
        noise: Field below this, in gauss, counts as none in `unsigned_flux`.
        strong: Field above this, in gauss, is strong.
        index: Index of the result, as the observations' times.

    Returns:
        A DataFrame, a row a magnetogram: `unsigned_flux`, `strong_flux`, `net_flux` (Mx), `strong_area` (millionths of
        the hemisphere), `max_field` (G), `gradient_max` (G/Mm, where the field is strong), `pil_length` (Mm),
        `pil_gradient_mean, pil_gradient_max` (G/Mm; 0 without a PIL), `pil_gradient_sum` (G: the gradient integrated
        along the PIL), `schrijver_r` (log10 of the unsigned flux in Mx weighted by nearness to a PIL, with a Gaussian
        of 15 Mm full width; 0 without), `valid_fraction` (share of the disk within 70 degrees that was valid).

    Raises:
        ValueError: Not square, or no valid pixel on the disk.
    """
    stack = np.asarray(magnetograms, dtype=np.float64)
    stack = stack[None] if stack.ndim == 2 else stack
    if stack.ndim != 3 or stack.shape[1] != stack.shape[2]:
        raise ValueError(f"magnetograms: expected (N, N) or (T, N, N), got {np.shape(magnetograms)}.")
    size = stack.shape[-1]
    radius = RSUN_PIXELS_1024 * size / 1024
    offset = np.arange(size) - (size - 1) / 2
    squared = (offset[:, None] ** 2 + offset[None, :] ** 2) / radius**2
    disk = squared < np.sin(np.radians(_LARGEST_ANGLE)) ** 2
    mu = np.sqrt(np.where(disk, 1 - squared, 1.0))
    pixel_cm = _SOLAR_RADIUS_CM / radius
    rows = [_statistics(field, disk, mu, pixel_cm, noise, strong) for field in stack]
    return pd.DataFrame(rows, index=index)


def _statistics(
    field: np.ndarray, disk: np.ndarray, mu: np.ndarray, pixel_cm: float, noise: float, strong: float
) -> dict[str, float]:
    valid = disk & np.isfinite(field)
    if not valid.any():
        raise ValueError("magnetogram: expected valid pixels on the disk, got none; drop the observation.")
    line_of_sight = np.where(valid, field, 0.0)
    radial = line_of_sight / mu
    area = np.where(valid, pixel_cm**2 / mu, 0.0)  # cm2 on the sphere
    flux = np.abs(radial) * area
    pixel_mm = pixel_cm / 1e8
    slope_y, slope_x = np.gradient(line_of_sight, pixel_mm)
    # One pixel in from the border of the valid part, so that no edge counts as a gradient.
    gradient = np.where(ndimage.binary_erosion(valid, np.ones((3, 3))), np.hypot(slope_x, slope_y), 0.0)
    is_strong = np.abs(line_of_sight) > strong
    square = np.ones((3, 3), dtype=bool)
    pil = ndimage.binary_dilation(line_of_sight > strong, square) & ndimage.binary_dilation(
        line_of_sight < -strong, square
    )
    pil &= valid
    on_line = gradient[pil]
    near = 0.0
    if pil.any():
        sigma = 15.0 / 2.3548 / pixel_mm  # full width at half maximum of 15 Mm
        nearness = ndimage.gaussian_filter(pil.astype(float), sigma)
        near = float(np.log10(max((flux * nearness / nearness.max()).sum(), 1.0)))
    hemisphere = 2 * np.pi * _SOLAR_RADIUS_CM**2
    return {
        "unsigned_flux": float(flux[np.abs(line_of_sight) > noise].sum()),
        "strong_flux": float(flux[is_strong].sum()),
        "net_flux": float((radial * area).sum()),
        "strong_area": float(area[is_strong].sum() / hemisphere * 1e6),
        "max_field": float(np.abs(line_of_sight).max()),
        "gradient_max": float(gradient[is_strong].max()) if is_strong.any() else 0.0,
        "pil_length": float(pil.sum() * pixel_mm),
        "pil_gradient_mean": float(on_line.mean()) if on_line.size else 0.0,
        "pil_gradient_max": float(on_line.max()) if on_line.size else 0.0,
        "pil_gradient_sum": float(on_line.sum() * pixel_mm),
        "schrijver_r": near,
        "valid_fraction": float(valid.sum() / disk.sum()),
    }


def _sklearn(module: str) -> Any:
    try:
        return import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError("this baseline needs scikit-learn: pip install scikit-learn") from error


__all__ = [
    "ClimatologyBaseline",
    "MagnetogramForestBaseline",
    "PastRateLogisticBaseline",
    "PersistenceBaseline",
    "TrailingRateBaseline",
    "classes_from_exceedance",
    "magnetogram_statistics",
]
