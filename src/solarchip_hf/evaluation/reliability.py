"""Reliability of probabilities: are 30% forecasts followed by flares 30% of the time?"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .bootstrap import block_bootstrap
from .flare_skill.skill_scores import reliability_bins


@dataclass(frozen=True)
class ReliabilityCurve:
    """Observed frequency against forecast probability, bin by bin.

    Attributes:
        edges: (bins + 1,) edges of probability.
        count: (bins,) forecasts.
        mean_probability: (bins,) mean forecast; NaN for an empty bin.
        observed_frequency: (bins,) share of events; NaN for an empty bin.
        low: (bins,) lower end of the block-bootstrap interval of the frequency; NaN without times or data.
        high: (bins,) its upper end.
        base_rate: Share of events in the sample.
        reliability: Mean squared distance of the curve from the diagonal: 0 is best.
        resolution: Mean squared distance of the curve from the base rate: more is better.
        uncertainty: base_rate (1 - base_rate). Brier score = reliability - resolution + uncertainty when all forecasts
            of a bin are equal (Murphy 1973, Journal of Applied Meteorology 12, 595).
        expected_calibration_error: Mean absolute distance of the curve from the diagonal.
    """

    edges: np.ndarray
    count: np.ndarray
    mean_probability: np.ndarray
    observed_frequency: np.ndarray
    low: np.ndarray
    high: np.ndarray
    base_rate: float
    reliability: float
    resolution: float
    uncertainty: float
    expected_calibration_error: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(self).items()}


def reliability_curve(
    probabilities: Any,
    observed: Any,
    *,
    num_bins: int = 10,
    strategy: str = "uniform",
    times: Any = None,
    block: str | None = "27D",
    num_resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> ReliabilityCurve:
    """Bins forecasts by probability and compares with what happened.

    Args:
        probabilities: (N,) float in [0, 1].
        observed: (N,) 0/1.
        num_bins: Number of bins; ties may leave fewer under `"quantile"`.
        strategy: `"uniform"` bins of probability, or `"quantile"` bins of equally many forecasts.
        times: (N,) times; given, every bin gets a block-bootstrap interval.
        block: Length of a block.
        num_resamples: Number of resamples.
        level: Nominal coverage.
        seed: Of the resampling.

    Returns:
        A `ReliabilityCurve`.

    Raises:
        ValueError: Lengths differ, values out of [0, 1], no sample, or an unknown strategy.
    """
    probabilities, observed = np.asarray(probabilities, dtype=float), np.asarray(observed, dtype=float)
    if probabilities.ndim != 1 or probabilities.shape != observed.shape or not len(observed):
        raise ValueError(
            f"expected two arrays of one equal, positive length, got {probabilities.shape} and {observed.shape}."
        )
    if not (np.isfinite(probabilities).all() and probabilities.min() >= 0 and probabilities.max() <= 1):
        raise ValueError("probabilities: expected values in [0, 1]; turn logits into probabilities first.")
    if not np.isin(observed, (0, 1)).all():
        raise ValueError("observed: expected 0 and 1; drop unknown windows (label -1) first.")
    if strategy == "uniform":
        bins = reliability_bins(probabilities, observed, num_bins)
        edges = np.array([*bins["low"], bins["high"][-1]])
    elif strategy == "quantile":
        edges = np.unique(np.quantile(probabilities, np.linspace(0, 1, num_bins + 1)))
        edges = edges if len(edges) > 1 else np.array([edges[0], np.nextafter(edges[0], 2)])
    else:
        raise ValueError(f"strategy: expected 'uniform' or 'quantile', got {strategy!r}.")

    index = (np.searchsorted(edges, probabilities, side="right") - 1).clip(0, len(edges) - 2)
    bins_kept = len(edges) - 1
    count = np.bincount(index, minlength=bins_kept)
    filled = np.where(count > 0, count, np.nan)
    mean = np.bincount(index, probabilities, bins_kept) / filled
    frequency = np.bincount(index, observed, bins_kept) / filled
    low, high = np.full(bins_kept, np.nan), np.full(bins_kept, np.nan)
    if times is not None:

        def by_bin(bin_index: np.ndarray, outcome: np.ndarray) -> dict[str, float]:
            total = np.bincount(bin_index, minlength=bins_kept)
            share = np.bincount(bin_index, outcome, bins_kept) / np.where(total > 0, total, np.nan)
            return {str(k): share[k] for k in range(bins_kept)}

        intervals = block_bootstrap(
            by_bin,
            index,
            observed,
            times=times,
            block=block,
            num_resamples=num_resamples,
            level=level,
            bounds={str(k): (0.0, 1.0) for k in range(bins_kept)},
            seed=seed,
        )
        for k in range(bins_kept):
            low[k], high[k] = intervals[str(k)].low, intervals[str(k)].high

    weight, base_rate = count / count.sum(), float(observed.mean())
    return ReliabilityCurve(
        edges=edges,
        count=count,
        mean_probability=mean,
        observed_frequency=frequency,
        low=low,
        high=high,
        base_rate=base_rate,
        reliability=float(np.nansum(weight * (mean - frequency) ** 2)),
        resolution=float(np.nansum(weight * (frequency - base_rate) ** 2)),
        uncertainty=base_rate * (1 - base_rate),
        expected_calibration_error=float(np.nansum(weight * np.abs(mean - frequency))),
    )


__all__ = ["ReliabilityCurve", "reliability_curve"]
