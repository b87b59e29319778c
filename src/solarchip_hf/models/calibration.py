"""From logits to calibrated probabilities of ordered classes, by a calibration that the configuration carries.

A calibration is a dict that JSON can hold, fitted on validation data (`solarchip_hf.evaluation.calibration`):

    {"method": "temperature", "temperature": 1.7, ...}
    {"method": "platt", "slope": [.9, 1.1, 1.0], "intercept": [-.2, .4, -1.3], ...}
    {"method": "isotonic", "x": [[...], [...], [...]], "y": [[...], [...], [...]], ...}

Platt's and the isotonic calibration have an entry for every boundary between classes (C+, M+, X+), and act on the
probability of reaching it. Besides, `fitted_on` says in words on what it was fitted, and `thresholds` holds the
probabilities from which a warning is issued, as `{"c_plus": .5, "m_plus": .3, "x_plus": .05}`, chosen there too.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

import torch

METHODS = ("temperature", "platt", "isotonic")


def exceedance_logits(logits: torch.Tensor) -> torch.Tensor:
    """Log-odds of reaching each class but the lowest, without cancellation.

    Args:
        logits: (N, K) of ordered classes.

    Returns:
        (N, K - 1) float32: log P(class >= k) - log P(class < k), k = 1..K-1.
    """
    logits = logits.float()
    above = logits.flip(-1).logcumsumexp(-1).flip(-1)[:, 1:]
    return above - logits.logcumsumexp(-1)[:, :-1]


def calibrated_probabilities(logits: torch.Tensor, calibration: Mapping[str, Any] | None = None) -> torch.Tensor:
    """Probabilities of ordered classes.

    Temperature: softmax of logits / temperature (Guo et al. 2017, arXiv 1706.04599). Platt: for every boundary,
    sigmoid(slope x log-odds + intercept) (Platt 1999). Isotonic: for every boundary, the probability of reaching it is
    read off a curve through the knots (x, y) (Zadrozny and Elkan 2002), constant beyond its ends. Where boundaries are
    calibrated apart, a higher class never gets more than a lower one that contains it: the smaller is taken.

    Args:
        logits: (N, K), any floating dtype.
        calibration: As in the text of this module; None: softmax.

    Returns:
        (N, K) float32, no entry negative, rows sum to 1.

    Raises:
        ValueError: Logits of another shape, or a calibration that does not fit them.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits: expected (N, K), got {tuple(logits.shape)}.")
    if calibration is None:
        return logits.float().softmax(-1)
    check_calibration(calibration, logits.shape[1])
    if calibration["method"] == "temperature":
        return (logits.float() / calibration["temperature"]).softmax(-1)
    odds = exceedance_logits(logits)
    if calibration["method"] == "platt":
        above = torch.sigmoid(odds * odds.new_tensor(calibration["slope"]) + odds.new_tensor(calibration["intercept"]))
    else:
        curves = zip(odds.sigmoid().unbind(-1), calibration["x"], calibration["y"], strict=True)
        above = torch.stack([_interpolate(p, p.new_tensor(x), p.new_tensor(y)) for p, x, y in curves], dim=-1)
    above = above.cummin(-1).values
    ones, zeros = torch.ones_like(above[:, :1]), torch.zeros_like(above[:, :1])
    return torch.cat([ones, above], -1) - torch.cat([above, zeros], -1)


def _interpolate(values: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if len(x) == 1:
        return y.expand_as(values)
    right = torch.searchsorted(x, values.contiguous()).clamp(1, len(x) - 1)
    share = ((values - x[right - 1]) / (x[right] - x[right - 1])).clamp(0, 1)
    return y[right - 1] + share * (y[right] - y[right - 1])


def check_calibration(calibration: Mapping[str, Any], num_classes: int) -> None:
    """Checks that a calibration can be used.

    Args:
        calibration: As in the text of this module.
        num_classes: Number of classes K.

    Raises:
        ValueError: Says what was expected.
    """
    if not isinstance(calibration, Mapping) or calibration.get("method") not in METHODS:
        method = calibration.get("method") if isinstance(calibration, Mapping) else calibration
        raise ValueError(f"calibration: expected a dict with a method of {', '.join(METHODS)}, got {method!r}.")
    method, boundaries = calibration["method"], num_classes - 1
    if method == "temperature":
        if not (_numbers([calibration.get("temperature")]) and calibration["temperature"] > 0):
            raise ValueError(f"calibration.temperature: expected above 0, got {calibration.get('temperature')!r}.")
    elif method == "platt":
        for name in ("slope", "intercept"):
            if not _numbers(calibration.get(name), boundaries):
                raise ValueError(
                    f"calibration.{name}: expected {boundaries} finite numbers, one a boundary between classes, "
                    f"got {calibration.get(name)!r}."
                )
        if min(calibration["slope"]) < 0:
            raise ValueError(f"calibration.slope: expected none below 0, got {calibration['slope']}.")
    else:
        _check_curves(calibration.get("x"), calibration.get("y"), boundaries)
    names = boundary_names(num_classes)
    for name, value in dict(calibration.get("thresholds") or {}).items():
        if name not in names:
            raise ValueError(f"calibration.thresholds: expected some of {', '.join(names)}, got {name!r}.")
        if not _numbers([value]) or not 0 <= value <= 1:
            raise ValueError(f"calibration.thresholds: expected probabilities, got {name}={value!r}.")


def boundary_names(num_classes: int) -> list[str]:
    """Names of the boundaries between classes: `c_plus`, `m_plus`, `x_plus` for four, else `1_plus`, `2_plus`, ..."""
    if num_classes == 4:
        return ["c_plus", "m_plus", "x_plus"]
    return [f"{boundary}_plus" for boundary in range(1, num_classes)]


def _check_curves(x: Any, y: Any, boundaries: int) -> None:
    if not all(isinstance(knots, Sequence) and len(knots) == boundaries for knots in (x, y)):
        raise ValueError(f"calibration.x and y: expected {boundaries} lists of knots, one a boundary between classes.")
    for ours, theirs in zip(x, y, strict=True):
        if not (_numbers(ours) and _numbers(theirs, len(ours)) and len(ours)):
            raise ValueError(f"calibration.x and y: expected equally many finite numbers, got {ours!r} and {theirs!r}.")
        rising = all(after > before for before, after in pairwise(ours))
        if not rising or sorted(theirs) != list(theirs) or theirs[0] < 0 or theirs[-1] > 1:
            raise ValueError(
                f"calibration.x and y: expected x that rises and y that never falls within 0..1, got {ours!r} "
                f"and {theirs!r}."
            )


def _numbers(values: Any, count: int | None = None) -> bool:
    """Whether these are (`count`) finite numbers."""
    return (
        isinstance(values, Sequence)
        and not isinstance(values, str)
        and count in (None, len(values))
        and all(isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )


__all__ = ["METHODS", "boundary_names", "calibrated_probabilities", "check_calibration", "exceedance_logits"]
