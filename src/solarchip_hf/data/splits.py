"""Splits in time, with a gap of a solar rotation at every border."""

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .durations import read_duration
from .flare_events import to_utc

GAP = "gap"


def chronological_split(
    times: Any, parts: Mapping[str, Any] | None = None, *, gap: str | pd.Timedelta = "27D"
) -> dict[str, np.ndarray]:
    """Cuts observations into consecutive parts in time that do not see one another's Sun.

    An active region lives for days to weeks and the Sun turns once in 27 days, so neighbouring observations are not
    independent: after each border the observations of the next `gap` days belong to no part.

    Args:
        times: N observation times in any order: a Series, an index, an array or a list, or a table with a column
            `time_nominal`, as `pair_observations` gives; naive ones are taken as UTC.
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
    gap = read_duration(gap, "gap", zero=True)
    stamps = _stamps(times)
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


@dataclass(frozen=True, eq=False)
class Fold:
    """One fold of a cross-validation in blocks of time.

    Attributes:
        train: Positions (int64, ascending in time) to fit on.
        test: Positions to score on.
        spans: First and last time of each block of the test part.
        train_counts: Number of observations of each class to fit on; empty where no classes were given.
        test_counts: The same of the test part.
    """

    train: np.ndarray
    test: np.ndarray
    spans: tuple[tuple[pd.Timestamp, pd.Timestamp], ...]
    train_counts: dict[Any, int]
    test_counts: dict[Any, int]

    @property
    def missing(self) -> dict[str, list[Any]]:
        """Classes that a part lacks, by its name; empty where both parts hold all. Skill there is undefined."""
        parts = {"train": self.train_counts, "test": self.test_counts}
        lacks = {name: [value for value, count in counts.items() if not count] for name, counts in parts.items()}
        return {name: values for name, values in lacks.items() if values}


def blocked_folds(
    times: Any,
    classes: Any = None,
    *,
    folds: int = 5,
    block: str | pd.Timedelta = "135D",
    gap: str | pd.Timedelta = "27D",
) -> list[Fold]:
    """Folds of a cross-validation made of blocks of time, each holding every class where that is possible.

    Time is cut into blocks of equal length, and the blocks are dealt out to the folds so that each gets its share of
    the rarer classes and of the observations, over the whole solar cycle; one long block a fold would put the minimum,
    with no large flare, into a fold of its own. Every observation with a class is in the test part of one fold. The
    training part of a fold is what lies at least `gap` from all of its test part.

    Args:
        times: N observation times in any order; naive ones are taken as UTC.
        classes: (N,) class of each observation, as `c_plus` or `label` of `label_flares`; None to look at times only.
            Missing and negative ones are unknown, and in no part.
        folds: Number of folds.
        block: Length of a block. Each costs the training part up to two gaps: a tenth of it with five folds, blocks of
            five rotations and gaps of one. Shorter blocks lose more.
        gap: Least time between a training and a test observation of a fold.

    Returns:
        The folds. `Fold.missing` says which classes a part lacks; a `UserWarning` says so too.

    Raises:
        ValueError: There are fewer blocks with observations than folds, a training part is empty, or an argument makes
            no sense.
    """
    gap, length = read_duration(gap, "gap", zero=True), read_duration(block, "block")
    stamps = _stamps(times)
    if folds < 2:
        raise ValueError(f"folds: expected 2 or more, got {folds}.")
    labels = np.zeros(len(stamps), dtype=np.int64) if classes is None else _known(classes, len(stamps))
    order = np.argsort(stamps.to_numpy(), kind="stable")
    order = order[labels[order] >= 0]
    ordered, known = stamps[order], labels[order]
    values = np.unique(known)
    number = ((ordered - ordered[0]) // length).to_numpy() if len(ordered) else np.empty(0, dtype=np.int64)
    blocks = np.unique(number)
    if len(blocks) < folds:
        raise ValueError(
            f"folds: expected at least {folds} blocks of {length} with observations of known class, got {len(blocks)}. "
            "Take fewer folds or shorter blocks."
        )
    fold_of = _deal(np.array([[(known[number == b] == v).sum() for v in values] for b in blocks]), folds)
    moments = ordered.to_numpy()
    result = []
    for fold in range(folds):
        own = blocks[fold_of == fold]
        test = np.isin(number, own)
        train = ~test & (_distance(moments, moments[test]) >= gap.to_timedelta64())
        if not train.any():
            raise ValueError(
                f"gap: expected something to fit on {gap} away from the test part of fold {fold}, got nothing. "
                "Take longer blocks or a shorter gap."
            )
        spans = tuple((ordered[number == b][0], ordered[number == b][-1]) for b in own)
        counts = [
            {} if classes is None else {value.item(): int((known[part] == value).sum()) for value in values}
            for part in (train, test)
        ]
        result.append(Fold(order[train].astype(np.int64), order[test].astype(np.int64), spans, *counts))
    poor = [f"fold {i} lacks {fold.missing}" for i, fold in enumerate(result) if fold.missing]
    if poor:
        warnings.warn(
            f"blocked_folds: {'; '.join(poor)}: skill there is undefined. Take fewer folds or shorter blocks.",
            stacklevel=2,
        )
    if classes is not None and len(values) < 2:
        warnings.warn(f"blocked_folds: all {len(order)} observations are of one class.", stacklevel=2)
    return result


def _deal(counts: np.ndarray, folds: int) -> np.ndarray:
    """The fold of each block, from its (blocks, classes) counts: the blocks richest in the rarest class go first."""
    rarity = np.argsort(counts.sum(axis=0), kind="stable")
    sorted_counts = counts[:, rarity]
    # within equal counts the order of time, so that neighbours go to different folds
    turn = np.lexsort((np.arange(len(counts)), *(-sorted_counts[:, ::-1].T)))
    totals = np.zeros((folds, counts.shape[1]), dtype=np.int64)
    fold_of = np.empty(len(counts), dtype=np.int64)
    left = len(counts)
    for block in turn:
        empty = [fold for fold in range(folds) if not totals[fold].any()]
        choice = empty if len(empty) >= left else range(folds)  # no fold stays without a block
        first = next((c for c in range(counts.shape[1]) if sorted_counts[block, c]), 0)
        fold = min(choice, key=lambda f: (totals[f, first], totals[f].sum(), f))
        totals[fold] += sorted_counts[block]
        fold_of[block] = fold
        left -= 1
    return fold_of


def _distance(moments: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Time from each moment to the nearest of the others (both sorted)."""
    after = np.searchsorted(others, moments)
    before = np.abs(moments - others[np.maximum(after - 1, 0)])
    return np.minimum(before, np.abs(others[np.minimum(after, len(others) - 1)] - moments))


def _known(classes: Any, count: int) -> np.ndarray:
    """Classes as integers, -1 where unknown."""
    values = pd.to_numeric(pd.Series(np.asarray(classes, dtype=object))).to_numpy(dtype=float, na_value=np.nan)
    if len(values) != count:
        raise ValueError(f"classes: expected one for each of {count} observations, got {len(values)}.")
    known = values[~np.isnan(values)]
    if (known != np.round(known)).any():
        raise ValueError(f"classes: expected whole numbers or booleans, got {known[known != np.round(known)][0]}.")
    return np.where(np.isnan(values) | (values < 0), -1, values).astype(np.int64)


def _stamps(times: Any) -> pd.DatetimeIndex:
    if isinstance(times, pd.DataFrame):
        if "time_nominal" not in times:
            raise ValueError(f"times: expected a table with the column time_nominal, got {list(times.columns)}.")
        times = times["time_nominal"]
    stamps = to_utc(times)
    if not len(stamps):
        raise ValueError("times: expected at least one observation, got none.")
    return stamps


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


__all__ = ["Fold", "blocked_folds", "chronological_split", "split_labels"]
