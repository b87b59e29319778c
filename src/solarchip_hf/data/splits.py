"""Splits in time, with a gap of a solar rotation at every border."""

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

GAP = "gap"


def chronological_split(
    times: Any, parts: Mapping[str, Any] | None = None, *, gap: str | pd.Timedelta = "27D"
) -> dict[str, np.ndarray]:
    """Cuts observations into consecutive parts in time that do not see one another's Sun.

    An active region lives for days to weeks and the Sun turns once in 27 days, so neighbouring observations are not
    independent: after each border the observations of the next `gap` days belong to no part.

    Args:
        times: N observation times in any order: a Series, an index, an array or a list; naive ones are taken as UTC.
        parts: Names in the order of time, each with its share of the observations (shares add up to 1), or each with
            the time at which it ends (exclusive; None for the last). By default `{"train": 0.7, "validation": 0.15,
            "test": 0.15}`.
        gap: Least time between observations of different parts: 27 days is one rotation; 41 clears a whole recurrence
            of a long-lived region.

    Returns:
        For each name the positions (int64, ascending in time) of its observations in `times`. Positions within a gap
        appear nowhere.

    Raises:
        ValueError: The parts are ill-posed, a time is missing, or a part ends empty.
    """
    parts = {"train": 0.7, "validation": 0.15, "test": 0.15} if parts is None else dict(parts)
    gap = pd.Timedelta(gap)
    if gap < pd.Timedelta(0):
        raise ValueError(f"gap: expected a time span of zero or more, got {gap}.")
    stamps = pd.DatetimeIndex(pd.to_datetime(pd.Series(np.asarray(times, dtype=object)), utc=True))
    if not len(stamps):
        raise ValueError("times: expected at least one observation, got none.")
    if stamps.isna().any():
        raise ValueError(f"times: expected a time for every observation, got {int(stamps.isna().sum())} missing.")
    order = np.argsort(stamps.to_numpy(), kind="stable")
    ordered = stamps[order]
    ends = _ends(ordered, parts)
    result: dict[str, np.ndarray] = {}
    start, last = 0, None
    for name, end in ends.items():
        begin = start if last is None else max(start, int(ordered.searchsorted(last + gap, side="left")))
        if begin >= end:
            raise ValueError(
                f"parts: expected at least one observation in every part, got none in {name!r} "
                f"({len(stamps)} observations from {ordered[0]} to {ordered[-1]}, gap {gap}). "
                "Move the borders, use more observations, or shorten the gap."
            )
        result[name] = order[begin:end].astype(np.int64)
        start, last = end, ordered[end - 1]
    return result


def split_labels(times: Any, parts: Mapping[str, Any] | None = None, *, gap: str | pd.Timedelta = "27D") -> np.ndarray:
    """The same split as `chronological_split`, as one label an observation.

    Args:
        times: As in `chronological_split`.
        parts: As in `chronological_split`.
        gap: As in `chronological_split`.

    Returns:
        (N,) object array of part names, `"gap"` for observations of no part.

    Raises:
        ValueError: As in `chronological_split`, or a part is called `"gap"`.
    """
    if parts is not None and GAP in parts:
        raise ValueError(f"parts: expected names other than {GAP!r}, which marks observations of no part.")
    labels = np.full(len(times), GAP, dtype=object)
    for name, positions in chronological_split(times, parts, gap=gap).items():
        labels[positions] = name
    return labels


def _ends(ordered: pd.DatetimeIndex, parts: dict[str, Any]) -> dict[str, int]:
    """Position after the last observation of each part, before gaps, in the order of time."""
    if not parts:
        raise ValueError("parts: expected at least one name, got none.")
    values = list(parts.values())
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        if min(values) <= 0 or not np.isclose(sum(values), 1.0):
            raise ValueError(f"parts: expected positive shares that add up to 1, got {parts}.")
        ends = np.rint(np.cumsum(values) * len(ordered)).astype(int).tolist()
        # observations of one moment never fall on two sides of a border
        ends = [int(ordered.searchsorted(ordered[end - 1], side="right")) if end else 0 for end in ends]
        return dict(zip(parts, ends, strict=True))
    if any(isinstance(value, int | float) for value in values) or any(value is None for value in values[:-1]):
        raise ValueError(f"parts: expected either shares or end times (None for the last part only), got {parts}.")
    stamps = [None if value is None else _utc(value) for value in values]
    dated = [stamp for stamp in stamps if stamp is not None]
    if any(later <= earlier for earlier, later in itertools.pairwise(dated)):
        raise ValueError(f"parts: expected end times that increase, got {parts}.")
    ends = [len(ordered) if stamp is None else int(ordered.searchsorted(stamp, side="left")) for stamp in stamps]
    return dict(zip(parts, ends, strict=True))


def _utc(value: Any) -> pd.Timestamp:
    stamp = pd.Timestamp(value)
    return stamp.tz_localize("UTC") if stamp.tzinfo is None else stamp.tz_convert("UTC")


__all__ = ["chronological_split", "split_labels"]
