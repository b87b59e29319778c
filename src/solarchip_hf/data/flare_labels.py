"""Flare labels of the window ahead (`target_*`) and flare history behind (`past_*`), kept apart by name."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from .durations import read_duration
from .flare_events import EVENT_COLUMNS, MAX_DURATION, flux_to_label, parse_times, to_utc

_NS_PER_DAY = 86_400_000_000_000
_NEEDED_COLUMNS = EVENT_COLUMNS[:5]  # times, class and flux; a table made by hand may lack the others
_THRESHOLDS = {"c": 1e-6, "m": 1e-5, "x": 1e-4}  # W/m2 at which the classes C, M and X begin

Coverage = Any  # None, a (start, end) pair, or a list of such pairs


def label_flares(
    times: Any,
    events: pd.DataFrame,
    horizon: str | pd.Timedelta = "24h",
    by: str = "start",
    coverage: Coverage = None,
    latency: str | pd.Timedelta = "0h",
) -> pd.DataFrame:
    """Labels each time with the largest flare of the window (t + latency, t + latency + horizon].

    Give the **nominal slot** of an observation, not its UTC time: HMI's 00:00 TAI is 23:59:23 UTC of the day before.

    A list of flares does not say when nobody listened. A window that is not wholly within `coverage` is unknown
    (`covered` false, label -1), not quiet, even if it holds a flare.

    Args:
        times: Times of the observations; naive ones mean UTC.
        events: Flares as `read_flare_events` returns them, of one irradiance scale; of a table made by hand the times,
            `goes_class` and `flux` are enough.
        horizon: Length of the window.
        by: A flare belongs to the window in which it has its `"start"` or its `"peak"`. An impossible peak (before
            the start, after the end, or more than 12 h from the start) is replaced by the start.
        coverage: `(start, end)` or a list of such pairs between which the list is complete. None takes the first and
            last start of the list, which is conservative: quiet days before and after are lost, and a list that was
            filtered by class shrinks. Give the true span where it is known.
        latency: Delay between the time and the issue of the forecast; the window begins at the issue.

    Returns:
        A DataFrame, a row a time, with the index of `times` where it is a Series and the times themselves otherwise:
        `target_class` (str, as `"M2.0"`, empty if none), `target_flux` (float64, W/m2, NaN if none), `target_location`
        (as `"N14E89"`) and `target_noaa_ar` (Int64) of that flare, missing where unknown,
        `target_cumulative` (float64: sum over the window's flares of class C and above of flux / 1e-6, so that C5 adds
        5, M2 adds 20, X1 adds 100; NaN where unknown), `label` (int64: 0AB, C, M, X as 0..3, -1 unknown), `c_plus,
        m_plus, x_plus` (nullable boolean, missing where unknown), `covered` (bool), `ongoing` (bool: a flare is in
        progress at t). `attrs` hold horizon, latency, by, scale, coverage and `doubtful_peaks`.

    Raises:
        ValueError: An unknown `by`, a horizon that is not positive, a negative latency, an empty coverage, events of
            several scales, or synthetic events among real ones.

    Source: the windows of SuryaBench and of the published SolarCHIP protocol; the cumulative index as in SuryaBench.
    """
    horizon, latency = read_duration(horizon, "horizon"), read_duration(latency, "latency", zero=True)
    moments = to_utc(times)
    begin = moments.asi8 + latency.as_unit("ns").value
    labels = _label_windows(moments, begin, begin + horizon.as_unit("ns").value, "right", events, by, coverage)
    labels.index = times.index if isinstance(times, pd.Series) else moments.rename("time")
    labels.attrs |= {"horizon": str(horizon), "latency": str(latency)}
    return labels


def label_calendar_days(
    times: Any, events: pd.DataFrame, *, by: str = "start", coverage: Coverage = None
) -> pd.DataFrame:
    """Labels each time with the largest flare of its own UTC calendar day, [00:00, 24:00), as the published method.

    For an observation at 00:00 this is a 24 h forecast; for one at noon half of the window is past: use
    `label_flares` there.

    Args:
        times: Nominal slots. A time within the last minute of a day is most likely a TAI slot given as UTC, which
            would take the label of the day before: it is warned about.
        events: As for `label_flares`.
        by: As for `label_flares`.
        coverage: As for `label_flares`.

    Returns:
        As `label_flares`, with the day's start in `target_day`.

    Raises:
        ValueError: As for `label_flares`.
    """
    moments = to_utc(times)
    late = moments.asi8 % _NS_PER_DAY >= _NS_PER_DAY - 60_000_000_000
    if late.any():
        warnings.warn(
            f"{int(late.sum())} of {len(late)} times lie in the last minute of a day: expected nominal slots, got what "
            "looks like TAI slots written as UTC; their labels belong to the day before. Use the nominal time.",
            UserWarning,
            stacklevel=2,
        )
    begin = moments.asi8 // _NS_PER_DAY * _NS_PER_DAY
    labels = _label_windows(moments, begin, begin + _NS_PER_DAY, "left", events, by, coverage)
    labels.index = times.index if isinstance(times, pd.Series) else moments.rename("time")
    labels.insert(0, "target_day", pd.DatetimeIndex(begin, tz="UTC"))
    labels.attrs |= {"horizon": "calendar day", "latency": "0"}
    return labels


def past_features(
    times: Any,
    events: pd.DataFrame,
    *,
    windows: Sequence[str] = ("1D", "3D", "7D", "27D"),
    latency: str | pd.Timedelta = "0h",
    coverage: Coverage = None,
) -> pd.DataFrame:
    """Describes the flares that were known at each time; nothing after t is seen.

    A flare is known once it has ended and `latency` has passed: until then neither its class nor its end exists.

    Args:
        times: Nominal slots; naive ones mean UTC.
        events: As for `label_flares`.
        windows: Lengths w of the windows (t - w, t] in which flares became known.
        latency: Delay of the flare list behind the Sun.
        coverage: As for `label_flares`; a window that is not wholly within it gives NaN.

    Returns:
        A DataFrame indexed as `label_flares` does, float64, for every window w (named `1d`, `3d`, ...):
        `past_c_rate_w, past_m_rate_w, past_x_rate_w` (flares per day of at least that class), `past_log_flux_w` (log10
        of the largest flux in W/m2, -8 if none), `past_label_w` (0..3); besides `past_days_since_m` (days since the
        last known flare of class M or above, at most the longest window).

    Raises:
        ValueError: Events of several scales, or a window that is not positive.
    """
    _one_scale(events)
    moments = to_utc(times)
    now = moments.asi8
    known = known_times(events) + pd.Timedelta(latency).as_unit("ns").value
    order = np.argsort(known, kind="stable")
    known, flux = known[order], events["flux"].to_numpy(dtype=float)[order]
    spans = _coverage_spans(coverage, events)
    columns: dict[str, np.ndarray] = {}
    stop = np.searchsorted(known, now, side="right")
    for window in windows:
        length = pd.Timedelta(window).as_unit("ns").value
        if length <= 0:
            raise ValueError(f"windows: expected positive lengths, got {window!r}.")
        name, days = _window_name(length), length / _NS_PER_DAY
        start = np.searchsorted(known, now - length, side="right")
        covered = _within(now - length, now, spans)
        for letter, threshold in _THRESHOLDS.items():
            count = np.concatenate([[0], np.cumsum(flux >= threshold)])
            columns[f"past_{letter}_rate_{name}"] = np.where(covered, (count[stop] - count[start]) / days, np.nan)
        largest = _largest(flux, start, stop)
        peak = np.where(largest >= 0, flux[largest] if len(flux) else np.nan, np.nan)
        columns[f"past_log_flux_{name}"] = np.where(covered, np.log10(np.fmax(peak, 1e-8)), np.nan)
        columns[f"past_label_{name}"] = np.where(covered, flux_to_label(peak), np.nan)

    longest = max(pd.Timedelta(window).as_unit("ns").value for window in windows)
    # Before the first such flare stands one that is too old to matter.
    large = np.concatenate([[now.min(initial=0) - longest], known[flux >= _THRESHOLDS["m"]]])
    since = np.minimum(now - large[np.searchsorted(large, now, side="right") - 1], longest)
    covered = _within(now - longest, now, spans)
    columns["past_days_since_m"] = np.where(covered, since / _NS_PER_DAY, np.nan)
    return pd.DataFrame(columns, index=times.index if isinstance(times, pd.Series) else moments.rename("time"))


def trailing_day_rates(
    times: Any,
    events: pd.DataFrame,
    *,
    window: str = "365D",
    min_days: int = 27,
    latency: str | pd.Timedelta = "0h",
    coverage: Coverage = None,
) -> pd.DataFrame:
    """Share of the whole UTC days behind t on which a flare of class C, M, X or above became known.

    The trailing 365-day share knows the phase of the solar cycle and nothing else: a forecast has to beat it.

    Args:
        times: Nominal slots; naive ones mean UTC.
        events: As for `label_flares`.
        window: Length of the window; where coverage began later, what there is of it.
        min_days: Fewer covered days than this give NaN.
        latency: Delay of the flare list behind the Sun.
        coverage: As for `label_flares`; of several spans only the one that holds t counts.

    Returns:
        A DataFrame indexed as `label_flares` does, float64: `past_c_days_365d, past_m_days_365d, past_x_days_365d`
        (shares of 1; the suffix follows the window) and `past_days_counted_365d`.

    Raises:
        ValueError: Events of several scales.
    """
    _one_scale(events)
    moments = to_utc(times)
    known = known_times(events) + pd.Timedelta(latency).as_unit("ns").value
    flux = events["flux"].to_numpy(dtype=float)
    length = pd.Timedelta(window).as_unit("ns").value
    name = _window_name(length)
    today = moments.asi8 // _NS_PER_DAY  # its own day is not over, hence not counted
    first = today - length // _NS_PER_DAY
    begin = np.full(len(today), np.iinfo(np.int64).max // 2)
    for start, stop in _coverage_spans(coverage, events):
        inside = (start <= moments.asi8) & (moments.asi8 <= stop)
        begin[inside] = -(-start // _NS_PER_DAY)
    first = np.maximum(first, begin)
    counted = (today - first).clip(0)
    columns: dict[str, np.ndarray] = {}
    for letter, threshold in _THRESHOLDS.items():
        active = np.unique(known[flux >= threshold] // _NS_PER_DAY)
        days = np.searchsorted(active, today) - np.searchsorted(active, first)
        share = days / np.maximum(counted, 1)
        columns[f"past_{letter}_days_{name}"] = np.where(counted >= max(min_days, 1), share, np.nan)
    columns[f"past_days_counted_{name}"] = counted.astype(float)
    return pd.DataFrame(columns, index=times.index if isinstance(times, pd.Series) else moments.rename("time"))


def known_times(events: pd.DataFrame) -> np.ndarray:
    """When each flare could be known: the latest of its start, its peak and its end.

    An end more than 12 h after the start is a fault of the list and counts as 12 h; where peak and end are missing,
    12 h are assumed.

    Args:
        events: Flares as `read_flare_events` returns them.

    Returns:
        int64 array, nanoseconds since 1970 in UTC, in the order of `events`.
    """
    start = to_utc(events["start_time"]).asi8
    limit = start + MAX_DURATION.as_unit("ns").value
    peak, end = _nanoseconds(events["peak_time"]), _nanoseconds(events["end_time"])
    missing = np.iinfo(np.int64).min
    assumed = np.where((peak == missing) & (end == missing), limit, start)
    return np.maximum.reduce([assumed, peak, np.minimum(end, limit)])


def _label_windows(
    moments: pd.DatetimeIndex,
    begin: np.ndarray,
    end: np.ndarray,
    side: Literal["left", "right"],
    events: pd.DataFrame,
    by: str,
    coverage: Coverage,
) -> pd.DataFrame:
    """Labels of windows (begin, end] for side "right", [begin, end) for side "left"; nanoseconds."""
    scale = _one_scale(events)
    if by not in ("start", "peak"):
        raise ValueError(f"by: expected 'start' or 'peak', got {by!r}.")
    start = to_utc(events["start_time"]).asi8
    peak, doubtful = _trusted_peaks(events, start)
    moment = start if by == "start" else peak
    order = np.argsort(moment, kind="stable")
    moment, flux = moment[order], events["flux"].to_numpy(dtype=float)[order]
    sorted_events = events.reindex(columns=list(EVENT_COLUMNS)).iloc[order]

    low = np.searchsorted(moment, begin, side=side)
    high = np.searchsorted(moment, end, side=side)
    largest = _largest(flux, low, high)
    spans = _coverage_spans(coverage, events)
    covered = _within(begin, end, spans)
    found = (largest >= 0) & covered
    target_flux = np.full(len(begin), np.nan)
    target_flux[found] = flux[largest[found]]
    # The row of each window's largest flare; -1 (none) becomes a row of missing values.
    rows = np.where(found, largest, -1)
    largest_events = sorted_events.reset_index(drop=True).reindex(rows).reset_index(drop=True)
    index = np.concatenate([[0.0], np.cumsum(np.where(flux >= _THRESHOLDS["c"], flux / 1e-6, 0.0))])
    label = np.where(covered, flux_to_label(target_flux), -1)
    labels = pd.DataFrame(
        {
            "target_class": largest_events["goes_class"].fillna("").astype("str"),
            "target_flux": target_flux,
            "target_location": largest_events["location"],
            "target_noaa_ar": largest_events["noaa_ar"],
            "target_cumulative": np.where(covered, (index[high] - index[low]).round(6), np.nan),
            "label": label,
        }
    )
    for threshold, name in enumerate(("c_plus", "m_plus", "x_plus"), start=1):
        labels[name] = pd.array(label >= threshold, dtype="boolean")
        labels.loc[~covered, name] = pd.NA
    labels["covered"] = covered
    labels["ongoing"] = _ongoing(moments.asi8, start, peak, events)
    labels.attrs = {
        "by": by,
        "scale": scale,
        "doubtful_peaks": int(doubtful.sum()),
        "coverage": [[str(pd.Timestamp(edge, tz="UTC")) for edge in span] for span in spans],
    }
    return labels


def _one_scale(events: pd.DataFrame) -> str:
    """The scale of all events; refuses several, synthetic flares among real ones, and what is no list of events."""
    missing = [name for name in _NEEDED_COLUMNS if name not in events]
    if missing:
        raise ValueError(
            f"events: expected the columns of read_flare_events, got a table without {missing}. "
            "Pass the list through read_flare_events, which takes a DataFrame too."
        )
    sources = sorted(events["source"].unique()) if "source" in events else []
    if len(sources) > 1 and "synthetic" in sources:
        raise ValueError(f"events: expected real or synthetic flares, got both ({sources}); label them apart.")
    scales = sorted(events["scale"].unique()) if "scale" in events else []
    if len(scales) > 1:
        raise ValueError(
            f"events: expected one irradiance scale, got {scales}: the same flare has another class on the other; "
            "choose one, as events[events.scale == 'GOES-R']."
        )
    return scales[0] if scales else ""


def _nanoseconds(column: pd.Series) -> np.ndarray:
    """int64 nanoseconds in UTC; a missing time becomes the smallest integer, as in pandas."""
    return parse_times(column, str(column.name)).asi8


def _trusted_peaks(events: pd.DataFrame, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Peaks with the impossible ones replaced by the start, and which those are."""
    peak, end = _nanoseconds(events["peak_time"]), _nanoseconds(events["end_time"])
    limit = start + MAX_DURATION.as_unit("ns").value
    known_end = end != np.iinfo(np.int64).min
    doubtful = (peak < start) | (peak > limit) | (known_end & (peak > end))
    return np.where(doubtful, start, peak), doubtful


def _ongoing(now: np.ndarray, start: np.ndarray, peak: np.ndarray, events: pd.DataFrame) -> np.ndarray:
    """Whether a flare has begun and not ended; an impossible or missing end counts as the peak."""
    if not len(start):
        return np.zeros(len(now), dtype=bool)
    end = _nanoseconds(events["end_time"])
    limit = start + MAX_DURATION.as_unit("ns").value
    end = np.where((end >= start) & (end <= limit), end, peak)
    order = np.argsort(start, kind="stable")
    latest_end = np.maximum.accumulate(end[order])  # over all flares that began before
    begun = np.searchsorted(start[order], now, side="right")
    return (begun > 0) & (latest_end[(begun - 1).clip(0)] > now)


def _coverage_spans(coverage: Coverage, events: pd.DataFrame) -> list[tuple[int, int]]:
    """Coverage as sorted, merged spans of nanoseconds."""
    if coverage is None:
        if not len(events):
            return []
        start = to_utc(events["start_time"]).asi8
        return [(int(start.min()), int(start.max()))]
    pairs = list(coverage)
    if len(pairs) == 2 and all(np.ndim(edge) == 0 for edge in pairs):
        pairs = [pairs]
    if any(np.ndim(pair) != 1 or len(pair) != 2 for pair in pairs):
        raise ValueError(f"coverage: expected a pair (start, end) or a list of such pairs, got {coverage!r}.")
    spans: list[tuple[int, int]] = []
    for pair in sorted(tuple(int(edge) for edge in to_utc(list(pair)).asi8) for pair in pairs):
        if pair[0] >= pair[1]:
            raise ValueError(
                f"coverage: expected (start, end) with start before end, got {[str(pd.Timestamp(e)) for e in pair]}."
            )
        if spans and pair[0] <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], pair[1]))
        else:
            spans.append((pair[0], pair[1]))
    return spans


def _within(begin: np.ndarray, end: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    inside = np.zeros(len(begin), dtype=bool)
    for start, stop in spans:
        inside |= (start <= begin) & (end <= stop)
    return inside


def _largest(flux: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Index of the largest flux (the earliest among equals) in each [low, high), -1 where empty.

    A sparse table: level k holds the best index of every run of 2^k, so a window is the better of two runs.
    """
    best = np.full(len(low), -1)
    filled = high > low
    if not filled.any():
        return best

    def better(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.where(flux[first] >= flux[second], first, second)

    low, high = low[filled], high[filled]
    level = np.frexp(high - low)[1] - 1  # floor of the binary logarithm, exactly
    table = [np.arange(len(flux))]
    for k in range(1, int(level.max()) + 1):
        half = 1 << (k - 1)
        table.append(better(table[-1][:-half], table[-1][half:]))
    winner = np.empty(len(low), dtype=np.int64)
    for k in np.unique(level):
        chosen = level == k
        winner[chosen] = better(table[k][low[chosen]], table[k][high[chosen] - (1 << k)])
    best[filled] = winner
    return best


def _window_name(length: int) -> str:
    return f"{length // _NS_PER_DAY}d" if length % _NS_PER_DAY == 0 else f"{length / 3.6e12:g}h"


__all__ = ["known_times", "label_calendar_days", "label_flares", "past_features", "trailing_day_rates"]
