"""Figures of a forecast: reliability with its histogram, and ROC curves.

Matplotlib is imported when a figure is drawn, and only its object interface is used.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .flare_skill.skill_scores import roc_auc
from .reliability import ReliabilityCurve

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reliability_figure(
    curves: Mapping[str, ReliabilityCurve], path: str | Path | None = None, *, title: str = ""
) -> "Figure":
    """Draws observed frequency against forecast probability, with the number of forecasts below.

    Bars are the curves' intervals, where they have any. Above the base rate, points below the dotted line (half way
    between the base rate and the diagonal) take away from the Brier skill against the sample's climatology.

    Args:
        curves: Name to curve, of the same samples.
        path: Where to save it; not saved if None.
        title: A heading; say there what is synthetic.

    Returns:
        The figure.

    Raises:
        ValueError: No curve.
    """
    if not curves:
        raise ValueError("curves: expected at least one, got none.")
    figure = _figure(5.0, 6.0)
    upper, lower = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
    base_rate = next(iter(curves.values())).base_rate
    diagonal = np.array([0.0, 1.0])
    upper.plot(diagonal, diagonal, color="0.6", linewidth=1, label="perfect")
    upper.plot(diagonal, (diagonal + base_rate) / 2, color="0.6", linewidth=1, linestyle=":", label="no skill")
    upper.axhline(base_rate, color="0.8", linewidth=1)
    for name, curve in curves.items():
        filled = curve.count > 0
        mean, frequency = curve.mean_probability[filled], curve.observed_frequency[filled]
        bars = np.stack([frequency - curve.low[filled], curve.high[filled] - frequency])
        known = None if np.isnan(bars).all() else np.nan_to_num(bars).clip(0)
        upper.errorbar(mean, frequency, yerr=known, marker="o", markersize=4, capsize=2, linewidth=1, label=name)
        lower.stairs(curve.count, curve.edges)
    upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="observed frequency", title=title)
    upper.legend(frameon=False, fontsize="small")
    lower.set(xlabel="forecast probability", ylabel="forecasts", yscale="log")
    return _save(figure, path)


def roc_figure(
    forecasts: Mapping[str, Any],
    observed: Any,
    path: str | Path | None = None,
    *,
    thresholds: Mapping[str, float] | None = None,
    title: str = "",
) -> "Figure":
    """Draws ROC curves of rival forecasts of one event, with the point at which each one warns.

    Args:
        forecasts: Name to (N,) probabilities.
        observed: (N,) bool.
        path: Where to save it; not saved if None.
        thresholds: Warning thresholds, one a forecast; each is marked on its curve.
        title: A heading; say there what is synthetic.

    Returns:
        The figure.

    Raises:
        ValueError: No forecast, or one class only.
    """
    observed = np.asarray(observed, dtype=bool)
    if not forecasts or observed.all() or not observed.any():
        raise ValueError("expected at least one forecast, and events as well as non-events.")
    figure = _figure(5.0, 5.0)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for name, probabilities in forecasts.items():
        rates = roc_curve(probabilities, observed)
        (line,) = axes.plot(*rates, linewidth=1.2, label=f"{name} ({roc_auc(probabilities, observed):.3f})")
        if thresholds and name in thresholds:
            warned = np.asarray(probabilities) >= thresholds[name]
            axes.plot(warned[~observed].mean(), warned[observed].mean(), marker="o", color=line.get_color())
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="false alarm rate (POFD)", ylabel="detection rate (POD)", title=title)
    axes.set_aspect("equal")
    axes.legend(frameon=False, fontsize="small", loc="lower right", title="area under the curve")
    return _save(figure, path)


def roc_curve(probabilities: Any, observed: Any) -> tuple[np.ndarray, np.ndarray]:
    """Detection and false alarm rates at every threshold.

    Args:
        probabilities: (N,) float.
        observed: (N,) bool, both values present.

    Returns:
        `(pofd, pod)`, from (0, 0) to (1, 1), a point a distinct probability.
    """
    levels, inverse = np.unique(np.asarray(probabilities, dtype=float), return_inverse=True)
    observed = np.asarray(observed, dtype=bool)
    rates = [
        np.concatenate([[0.0], np.cumsum(np.bincount(inverse[chosen], minlength=len(levels))[::-1]) / chosen.sum()])
        for chosen in (~observed, observed)
    ]
    return rates[0], rates[1]


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: str | Path | None) -> "Figure":
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    return figure


__all__ = ["reliability_figure", "roc_curve", "roc_figure"]
