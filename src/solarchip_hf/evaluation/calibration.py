"""Fitting, on validation data, what turns a network's logits into probabilities that can be believed."""

from importlib import import_module
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax

from ..models.calibration import METHODS, boundary_names, calibrated_probabilities, exceedance_logits
from .flare_skill.skill_scores import CLASS_NAMES, best_threshold, binary_scores, exceedance

# Fewer events (or non-events) than this at a boundary tell of a shift, but not of a slope or a curve.
_FEWEST = 5


def fit_calibration(
    logits: Any, labels: Any, method: str = "platt", *, fitted_on: str = "validation", score: str = "tss"
) -> dict[str, Any]:
    """Fits a calibration and the thresholds of warning on validation data.

    - `temperature`: one number for all classes, by maximum likelihood. It keeps the order of forecasts and the class
      balance that the network has learnt, so it does not undo class weights.
    - `platt`: slope (not negative) and intercept of the log-odds at every boundary (C+, M+, X+), by maximum likelihood
      with Platt's smoothed targets. With fewer than 5 events or non-events at a boundary the slope stays 1.
    - `isotonic`: the non-decreasing curve with the least squared error at every boundary (scikit-learn), within
      1/(N+2) and 1 - 1/(N+2). It needs hundreds of samples; with fewer than 5 events or non-events at a boundary the
      curve is the constant (events + 1)/(N + 2).

    Args:
        logits: (N, K) of the validation part.
        labels: (N,) classes 0..K-1, none unknown.
        method: `"temperature"`, `"platt"` or `"isotonic"`.
        fitted_on: In words, what the data are; written into the result.
        score: What the thresholds maximise, as for `best_threshold`.

    Returns:
        A calibration as `solarchip_hf.models.calibration` describes it, to be put into `config.calibration`. Its
        `thresholds` leave out boundaries at which validation has no events, or nothing else.

    Raises:
        ValueError: Shapes, labels or a method that do not fit.
        ImportError: Isotonic without scikit-learn.
    """
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != (len(logits),) or not len(labels):
        raise ValueError(f"expected logits (N, K) and labels (N,), got {logits.shape} and {labels.shape}.")
    classes = logits.shape[1]
    if not np.isfinite(logits).all() or not np.isin(labels, range(classes)).all():
        raise ValueError(f"expected finite logits and labels in 0..{classes - 1}; drop unknown windows (-1) first.")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}.")
    odds = exceedance_logits(torch.from_numpy(logits)).double().numpy()
    events = labels[:, None] >= np.arange(1, classes)
    calibration: dict[str, Any] = {"method": method}
    if method == "temperature":
        calibration["temperature"] = _temperature(logits, labels)
    elif method == "platt":
        fits = [_platt(odds[:, k], events[:, k]) for k in range(classes - 1)]
        calibration |= {"slope": [fit[0] for fit in fits], "intercept": [fit[1] for fit in fits]}
    else:
        curves = [_isotonic(expit(odds[:, k]), events[:, k]) for k in range(classes - 1)]
        calibration |= {"x": [curve[0] for curve in curves], "y": [curve[1] for curve in curves]}
    calibration["fitted_on"] = fitted_on
    calibration["samples"] = len(labels)
    probabilities = calibrated_probabilities(torch.from_numpy(logits), calibration).double().numpy()
    calibration["thresholds"] = choose_thresholds(probabilities, labels, score=score)
    calibration["threshold_score"] = score
    return calibration


def choose_thresholds(probabilities: Any, labels: Any, *, score: str = "tss") -> dict[str, float]:
    """The threshold of warning at every boundary, chosen on validation data.

    Args:
        probabilities: (N, K) calibrated probabilities of the validation part.
        labels: (N,) classes.
        score: As for `best_threshold`.

    Returns:
        By the names of `label_flares`: `c_plus`, `m_plus`, `x_plus` (`1_plus`, ... unless K is 4). Boundaries with no
        events, or nothing else, are left out.
    """
    probabilities, labels = np.asarray(probabilities, dtype=float), np.asarray(labels)
    above = exceedance(probabilities)
    thresholds = {}
    for k, name in enumerate(boundary_names(probabilities.shape[1])):
        observed = labels > k
        if observed.any() and not observed.all():
            thresholds[name] = best_threshold(above[:, k], observed, score)[0]
    return thresholds


class ValidationScore:
    """Scores of logits on the validation part: what chooses the best checkpoint.

    The logits are calibrated first (Platt, on the same validation part), since what is delivered will be: class weights
    and focal loss shift raw probabilities, and would be punished for a shift that calibration removes. The scores rank
    checkpoints; as estimates of skill they flatter, since the calibration has seen these labels.

    Args:
        training_classes: (N,) labels of the training part: the climatology that the Brier skill is measured against.
        boundary: `"C+"`, `"M+"` or `"X+"`.

    Raises:
        ValueError: An unknown boundary, or no known label.
    """

    def __init__(self, training_classes: Any, boundary: str = "M+"):
        names = [f"{name}+" for name in CLASS_NAMES[1:]]
        if boundary not in names:
            raise ValueError(f"boundary: expected one of {', '.join(names)}, got {boundary!r}.")
        classes = np.asarray(training_classes)
        classes = classes[classes >= 0]
        if not len(classes):
            raise ValueError("training_classes: expected at least one known label, got none.")
        self.boundary, self.level = boundary, names.index(boundary) + 1
        self.climatology = float((classes >= self.level).mean())

    def __call__(self, logits: Any, labels: Any) -> dict[str, float]:
        """Scores of (N, K) logits against (N,) labels.

        Returns:
            `bss` against the training climatology, `bss_sample`, `auc`, and `tss` and `hss` at the thresholds that are
            best for each; NaN where undefined.
        """
        logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
        observed = labels >= self.level
        raw = exceedance_logits(torch.from_numpy(logits)).double().numpy()[:, self.level - 1]
        slope, intercept = _platt(raw, observed)
        probabilities = expit(slope * raw + intercept)
        scores = binary_scores(probabilities, observed, 0.5, self.climatology)
        best = {"tss": float("nan"), "hss": float("nan")}
        if observed.any() and not observed.all():
            best = {name: best_threshold(probabilities, observed, name)[1] for name in best}
        return {"bss": scores["bss_training"], "bss_sample": scores["bss_sample"], "auc": scores["auc"], **best}


def _temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(logits / np.exp(log_temperature), axis=1)[rows, labels].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-5.0, 5.0), method="bounded").x))


def _platt(odds: np.ndarray, events: np.ndarray) -> tuple[float, float]:
    """Slope and intercept of log-odds, with Platt's targets (N+ + 1)/(N+ + 2) and 1/(N- + 2)."""
    positive, negative = int(events.sum()), int((~events).sum())
    targets = np.where(events, (positive + 1) / (positive + 2), 1 / (negative + 2))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        z = parameters[0] * odds + parameters[1]
        error = expit(z) - targets
        return float((np.logaddexp(0, z) - targets * z).mean()), np.array([(error * odds).mean(), error.mean()])

    slopes = (0.0, None) if min(positive, negative) >= _FEWEST else (1.0, 1.0)
    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=[slopes, (None, None)])
    return float(found.x[0]), float(found.x[1])


def _isotonic(probabilities: np.ndarray, events: np.ndarray) -> tuple[list[float], list[float]]:
    """Knots of the curve."""
    count, positive = len(events), int(events.sum())
    if min(positive, count - positive) < _FEWEST:
        return [0.5], [(positive + 1) / (count + 2)]
    try:
        regression = import_module("sklearn.isotonic").IsotonicRegression
    except ImportError as error:
        raise ImportError("method='isotonic': scikit-learn is needed: pip install scikit-learn") from error
    edge = 1 / (count + 2)
    fit = regression(y_min=edge, y_max=1 - edge, out_of_bounds="clip")
    # in the precision of the forward pass: knots that coincide there would divide by zero
    fit.fit(probabilities.astype(np.float32).astype(np.float64), events.astype(float))
    return fit.X_thresholds_.tolist(), fit.y_thresholds_.tolist()


__all__ = ["ValidationScore", "boundary_names", "choose_thresholds", "fit_calibration"]
