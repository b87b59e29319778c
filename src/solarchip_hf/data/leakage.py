"""Checks that features of the past do not see the future."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from .flare_events import format_goes_class, to_utc
from .flare_labels import known_times

TARGET_NAMES = ("label", "c_plus", "m_plus", "x_plus")

# Above this area under the ROC curve a feature is taken for the label itself; honest flare features stay below .95.
_SUSPICIOUS_AUC = 0.995
_FEWEST_OF_A_KIND = 5


class LeakageError(ValueError):
    """A feature knows what could not be known at its time."""


def check_past_features(
    features: Callable[[Any, pd.DataFrame], pd.DataFrame],
    times: Any,
    events: pd.DataFrame,
    *,
    num_times: int = 8,
    seed: int = 0,
) -> int:
    """Changes what happens after t and demands that no `past_*` column up to t changes.

    For each of several t, the flares not yet known at t are (1) given one another's classes, (2) all made A1.0, (3)
    all made X9.9, (4) moved to random times after t; the list keeps its first and last start. A column that
    changes in a row at or before t has looked ahead.

    Args:
        features: Function of `(times, events)` that returns a row a time, as `past_features`.
        times: Times of the rows; naive ones mean UTC.
        events: Flares as `read_flare_events` returns them.
        num_times: Number of times t, spread evenly over the rows.
        seed: Of the permutations.

    Returns:
        The number of changed lists that were tried.

    Raises:
        LeakageError: Names the columns that changed, and the first t at which they did.
        ValueError: There is no `past_*` column, or no flare after any t: nothing would be tested.
    """
    moments = to_utc(times)
    rng = np.random.default_rng(seed)
    reference = features(times, events)
    columns = [name for name in reference if str(name).startswith("past_")]
    if not columns:
        raise ValueError(f"features: expected columns named past_*, got {list(reference)}.")
    known = known_times(events)
    cuts = np.unique(np.sort(moments.asi8)[np.linspace(0, len(moments) - 1, num_times).round().astype(int)])
    tried = 0
    for cut in cuts:
        future = np.flatnonzero(known > cut)
        if len(future) < 2:
            continue
        rows = moments.asi8 <= cut
        for changed in _changed_futures(events, future, cut, rng):
            tried += 1
            again = features(times, changed)
            leaking = [name for name in columns if not _same(reference[name][rows], again[name][rows])]
            if leaking:
                raise LeakageError(
                    f"features {', '.join(leaking)}: expected values that depend on flares known at t, got values that "
                    f"change with flares after {pd.Timestamp(cut, tz='UTC')}; use only what is known at t."
                )
    if not tried:
        raise ValueError("events: expected flares after some of the times, got none; nothing could be tested.")
    return tried


def check_feature_table(features: pd.DataFrame, targets: pd.DataFrame) -> None:
    """Refuses a table of features that holds the target, under its own name or another.

    Args:
        features: A row a time; every column must be a feature. Names need not begin with `past_` (an image statistic
            belongs to the time itself), but none may be that of a target.
        targets: The labels of the same rows, as `label_flares` returns them.

    Raises:
        LeakageError: A column bears a target's name, equals a target up to renaming of its values, or separates one of
            the thresholds C+, M+, X+ all but perfectly (AUC above .995, with at least 5 rows on both sides).
        ValueError: The tables differ in length.
    """
    if len(features) != len(targets):
        raise ValueError(f"features and targets: expected equal lengths, got {len(features)} and {len(targets)}.")
    named = [name for name in features if str(name).startswith("target_") or name in TARGET_NAMES]
    if named:
        raise LeakageError(f"features: expected no target among them, got {named}; keep targets in their own table.")
    label = targets["label"].to_numpy()
    known = label >= 0
    label = label[known]
    leaks = {}
    for name in features:
        column = features[name]
        if not pd.api.types.is_numeric_dtype(column):  # text, times: only the pattern of equal values matters
            column = pd.Series(pd.factorize(column)[0])
        reason = _resembles(column.to_numpy(dtype=float, na_value=np.nan)[known], label)
        if reason:
            leaks[str(name)] = reason
    if leaks:
        raise LeakageError(f"features: expected what was known at t, got the target in disguise: {leaks}.")


def _changed_futures(events: pd.DataFrame, future: np.ndarray, cut: int, rng: np.random.Generator):
    permuted = rng.permutation(future)
    changed = events.copy()
    for name in ("flux", "goes_class"):
        changed[name] = changed[name].to_numpy(copy=True)
        changed.iloc[future, changed.columns.get_loc(name)] = events[name].to_numpy()[permuted]
    yield changed
    for flux in (1e-8, 9.9e-4):
        changed = events.copy()
        changed.iloc[future, changed.columns.get_loc("flux")] = flux
        changed.iloc[future, changed.columns.get_loc("goes_class")] = format_goes_class(flux)
        yield changed
    # A flare in progress at t keeps its start, which is past; of the others, the last keeps its place.
    start = to_utc(events["start_time"]).asi8
    movable = future[(start[future] > cut) & (start[future] < start.max())]
    if len(movable):
        changed = events.copy()
        shift = rng.integers(cut + 1, start.max() + 1, len(movable)) - start[movable]
        for name in ("start_time", "peak_time", "end_time"):
            moved = changed[name].iloc[movable] + pd.to_timedelta(shift, unit="ns")
            changed[name] = moved.reindex(changed.index).fillna(changed[name])
        yield changed


def _same(first: pd.Series, second: pd.Series) -> bool:
    a, b = (s.to_numpy(dtype=float, na_value=np.nan) for s in (first, second))
    return bool(np.array_equal(a, b, equal_nan=True))


def _resembles(values: np.ndarray, label: np.ndarray) -> str:
    finite = np.isfinite(values)
    values, label = values[finite], label[finite]
    kinds = len(np.unique(label))
    if kinds < 2:
        return ""
    pairs = len(np.unique(np.stack([values, label.astype(float)]), axis=1).T)
    if pairs == kinds == len(np.unique(values)):
        return "equals the label"
    ranks = pd.Series(values).rank().to_numpy()
    for threshold, name in ((1, "C+"), (2, "M+"), (3, "X+")):
        positive = label >= threshold
        n, m = int(positive.sum()), int((~positive).sum())
        if min(n, m) >= _FEWEST_OF_A_KIND:
            auc = (ranks[positive].sum() - n * (n + 1) / 2) / (n * m)
            if max(auc, 1 - auc) > _SUSPICIOUS_AUC:
                return f"separates {name} with an area under the ROC curve of {max(auc, 1 - auc):.4f}"
    return ""


__all__ = ["LeakageError", "check_feature_table", "check_past_features"]
