"""Where a forecast's skill comes from: by year, by change, by place on the disk, beside its rivals."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from ..data.flare_events import to_utc
from .bootstrap import Bounds, block_bootstrap
from .flare_skill.skill_scores import CLASS_NAMES, binary_scores, exceedance, flare_scores, flatten_scores

# Least and largest possible value of the scores of `binary_scores`; a bias has no largest, a Brier skill no least.
SCORE_BOUNDS: dict[str, Bounds] = {
    **dict.fromkeys(("tss", "hss"), (-1.0, 1.0)),
    **dict.fromkeys(("pod", "pofd", "far", "csi", "acc", "auc", "brier"), (0.0, 1.0)),
    **dict.fromkeys(("bss", "bss_training", "bss_sample"), (-np.inf, 1.0)),
    "bias": (0.0, np.inf),
}
_BOUNDARIES = {f"{name}+": k for k, name in enumerate(CLASS_NAMES) if k}


def shuffle_within(predictions: Any, groups: Any, *, seed: int = 0) -> np.ndarray:
    """Permutes forecasts within groups, as years: what skill is left is the groups' own mean, not the forecast's.

    Args:
        predictions: (N,) or (N, K).
        groups: (N,) labels of groups.
        seed: Of the permutation.

    Returns:
        The permuted forecasts.
    """
    predictions, groups = np.asarray(predictions), np.asarray(groups)
    rng = np.random.default_rng(seed)
    shuffled = predictions.copy()
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        shuffled[rows] = predictions[rng.permutation(rows)]
    return shuffled


def changed_windows(times: Any, labels: Any, *, boundary: str = "M+", lag: str = "24h") -> pd.array:
    """Whether the outcome differs from the one a day before: the windows on which persistence always fails.

    Args:
        times: (N,) times, without repetition.
        labels: (N,) classes 0..3, -1 unknown.
        boundary: `"C+"`, `"M+"` or `"X+"`.
        lag: The earlier window.

    Returns:
        (N,) nullable boolean; missing where one of the two is unknown or the earlier time is not in the sample.

    Raises:
        ValueError: Times repeat.
    """
    index = to_utc(times)
    if index.has_duplicates:
        raise ValueError("times: expected no repetition; average or drop the repeated samples first.")
    labels = np.asarray(labels)
    before = pd.Series(labels, index=index).reindex(index - pd.Timedelta(lag)).to_numpy(dtype=float)
    unknown = ~np.isfinite(before) | (np.nan_to_num(before, nan=-1) < 0) | (labels < 0)
    level = _BOUNDARIES[boundary]
    changed = pd.array((labels >= level) != (before >= level), dtype="boolean")
    changed[unknown] = pd.NA
    return changed


def scores_by_group(predictions: Any, references: Any, groups: Any, **options: Any) -> pd.DataFrame:
    """Scores every group apart, as years or seasons; a group with one class only gives NaN where a score is undefined.

    Args:
        predictions: (N,) or (N, K) probabilities.
        references: (N,) 0/1 or classes.
        groups: (N,) labels of groups.
        **options: Of `flare_scores`.

    Returns:
        A DataFrame, a row a group, columns as of `flatten_scores`.
    """
    predictions, references, groups = np.asarray(predictions), np.asarray(references), np.asarray(groups)
    rows = {
        group: flatten_scores(flare_scores(predictions[groups == group], references[groups == group], **options))
        for group in np.unique(groups)
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def recall_by_angle(
    probabilities: Any,
    observed: Any,
    angles: Any,
    *,
    threshold: float = 0.5,
    edges: tuple[float, ...] = (0, 45, 70, 91),
) -> pd.DataFrame:
    """Share of events that were warned of, by distance of the flare from the disk's centre.

    Quiet windows have no place on the disk, so that recall is all there is to compare.

    Args:
        probabilities: (N,) float.
        observed: (N,) bool.
        angles: (N,) degrees from the centre of the largest flare, as `disk_angle(labels.target_location)`; NaN where
            unknown.
        threshold: Warning threshold.
        edges: Edges of the bins in degrees.

    Returns:
        A DataFrame with `low, high, events, hits, pod` a bin, and a last row (NaN edges) for flares of unknown place.
    """
    probabilities, angles = np.asarray(probabilities, dtype=float), np.asarray(angles, dtype=float)
    observed = np.asarray(observed, dtype=bool)
    rows = []
    for low, high in [*pairwise(edges), (np.nan, np.nan)]:
        chosen = observed & (np.isnan(angles) if np.isnan(low) else (angles >= low) & (angles < high))
        events, hits = int(chosen.sum()), int((chosen & (probabilities >= threshold)).sum())
        rows.append(
            {"low": low, "high": high, "events": events, "hits": hits, "pod": hits / events if events else np.nan}
        )
    return pd.DataFrame(rows)


def score_forecasts(
    forecasts: Mapping[str, Any],
    references: Any,
    times: Any,
    *,
    climatology: Any,
    thresholds: Mapping[str, float] | float = 0.5,
    boundary: str = "M+",
    scores: tuple[str, ...] = ("tss", "hss", "auc", "bss_training", "bss_sample"),
    block: str | None = "27D",
    num_resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Scores rival forecasts on the same samples, each with the same resampled interval.

    Args:
        forecasts: Name to (N, 4) class probabilities, or (N,) probabilities of the boundary.
        references: (N,) classes 0..3, none unknown.
        times: (N,) times.
        climatology: (4,) class frequencies of the training part.
        thresholds: Warning threshold, or one a forecast; chosen on validation data (`best_threshold`).
        boundary: `"C+"`, `"M+"` or `"X+"`.
        scores: Scores of `binary_scores` to resample.
        block: Length of a block.
        num_resamples: Number of resamples.
        level: Nominal coverage.
        seed: Of the resampling and of the shuffling within years.

    Returns:
        A DataFrame, a row a forecast: for every score `s` the columns `s, s_low, s_high`; `threshold`; `tss_half`, the
        TSS at 0.5; `tss_shuffled`, the TSS of the forecasts shuffled within years; `tss_changed`, the TSS on windows
        whose outcome differs from the day before (NaN where there is none); `count` and `base_rate`.

    Raises:
        ValueError: Unknown labels or lengths that differ.
    """
    references = np.asarray(references)
    if not np.isin(references, range(len(CLASS_NAMES))).all():
        raise ValueError("references: expected classes 0..3; drop unknown windows (label -1) first.")
    moments = to_utc(times)
    column = _BOUNDARIES[boundary]
    observed = references >= column
    frequencies = np.asarray(climatology, dtype=float)
    base = float(frequencies[column:].sum() / frequencies.sum())
    changed = None if moments.has_duplicates else changed_windows(moments, references, boundary=boundary)
    changed = np.zeros(len(observed), bool) if changed is None else changed.to_numpy(dtype=bool, na_value=False)
    rows = {}
    for name, forecast in forecasts.items():
        forecast = np.asarray(forecast, dtype=float)
        if len(forecast) != len(references):
            raise ValueError(f"{name}: expected {len(references)} forecasts, got {len(forecast)}.")
        above = forecast if forecast.ndim == 1 else exceedance(forecast)[:, column - 1]
        threshold = float(thresholds[name] if isinstance(thresholds, Mapping) else thresholds)

        def resampled(probabilities: np.ndarray, events: np.ndarray, threshold: float = threshold) -> dict[str, float]:
            every = binary_scores(probabilities, events, threshold, base)
            return {score: every[score] for score in scores}

        intervals = block_bootstrap(
            resampled,
            above,
            observed,
            times=moments,
            block=block,
            num_resamples=num_resamples,
            level=level,
            bounds=SCORE_BOUNDS,
            seed=seed,
        )
        row: dict[str, float] = {}
        for score, interval in intervals.items():
            row |= {score: interval.estimate, f"{score}_low": interval.low, f"{score}_high": interval.high}
        row["threshold"] = threshold
        row["tss_half"] = binary_scores(above, observed, 0.5)["tss"]
        mixed = shuffle_within(above, moments.year, seed=seed)
        row["tss_shuffled"] = binary_scores(mixed, observed, threshold)["tss"]
        row["tss_changed"] = (
            binary_scores(above[changed], observed[changed], threshold)["tss"] if changed.any() else np.nan
        )
        rows[name] = row | {"count": float(len(observed)), "base_rate": float(observed.mean())}
    return pd.DataFrame.from_dict(rows, orient="index")


__all__ = ["SCORE_BOUNDS", "changed_windows", "recall_by_angle", "score_forecasts", "scores_by_group", "shuffle_within"]
