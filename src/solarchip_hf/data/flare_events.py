"""Flare lists of NOAA/NCEI, NOAA/SWPC and HEK in one schema, with their faults counted."""

import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

logger = logging.getLogger(__name__)

EVENT_COLUMNS = (
    "start_time",
    "peak_time",
    "end_time",
    "goes_class",
    "flux",
    "location",
    "noaa_ar",
    "source",
    "scale",
)

# Decades of the GOES classes: the number behind the letter multiplies this peak irradiance (0.1 to 0.8 nm), W/m2.
CLASS_EXPONENTS = {"A": -8, "B": -7, "C": -6, "M": -5, "X": -4}

# The longest flares of the GOES era decay within about 12 hours; a longer one is a mistyped or missed end.
MAX_DURATION = pd.Timedelta("12h")

# A region number is given for one passage over the visible disk (13.6 days) and a flare behind the limb adds little:
# a number that flares for longer than this is a typing error or a number used again.
MAX_REGION_LIFE = pd.Timedelta("20D")

# NOAA's region numbers passed 10000 in June 2002; reports with four digits go on counting modulo 10000.
_REGION_ROLLOVER = pd.Timestamp("2002-06-14", tz="UTC")

_NCEI_NAMES = {"time": "peak_time", "flare_class": "goes_class", "active_region": "noaa_ar"}
_HEK_NAMES = {
    "event_starttime": "start_time",
    "event_peaktime": "peak_time",
    "event_endtime": "end_time",
    "fl_goescls": "goes_class",
    "ar_noaanum": "noaa_ar",
    "hgs_x": "longitude",
    "hgs_y": "latitude",
}
_LOCATION_PAIRS = (
    ("flare_loc_swpc_hgs_lat", "flare_loc_swpc_hgs_lon"),
    ("flare_loc_xrs_hgs_lat", "flare_loc_xrs_hgs_lon"),
    ("latitude", "longitude"),
)


def parse_goes_class(goes_class: Any) -> np.ndarray:
    """Turns GOES classes into peak irradiances, so that X13.3 is larger than X9.3.

    Args:
        goes_class: One class or many, as `"M2.0"`, `"x13.3"`; a bare letter means 1.0. Of a saturated flare, as
            `"X10+"`, the number is a lower bound, and is taken.

    Returns:
        float64 array of the input's length (0-d for one class), W/m2; NaN where the text is no class.
    """
    parts = _class_parts(pd.Series(np.atleast_1d(np.asarray(goes_class, dtype=object))))
    exponent = parts[0].map({letter: f"e{power}" for letter, power in CLASS_EXPONENTS.items()})
    # Decimal text, not a product: "M1.0" is exactly 1e-5, so a threshold comparison cannot miss by one rounding.
    flux = pd.to_numeric(parts[1].fillna("1.0") + exponent, errors="coerce").to_numpy(dtype=float, na_value=np.nan)
    return flux.reshape(np.shape(goes_class))


def _class_parts(texts: pd.Series) -> pd.DataFrame:
    """Letter, number and the plus sign of a saturated flare; missing where the text is no class."""
    return texts.astype("string").str.strip().str.upper().str.extract(r"^([ABCMX])(\d+(?:\.\d*)?)?(\+)?$")


def format_goes_class(flux: float) -> str:
    """Writes a peak irradiance as a GOES class, truncated to one decimal as NOAA does.

    Args:
        flux: Peak irradiance in W/m2 (0.1 to 0.8 nm).

    Returns:
        The class, as `"M2.0"`; an empty string for NaN or a flux below A0.1.
    """
    if not np.isfinite(flux) or flux < 1e-9:
        return ""
    letter = next((name for name in "XMCB" if flux >= float(f"1e{CLASS_EXPONENTS[name]}")), "A")
    # 1e-9 absorbs the rounding of the division (2e-05 / 1e-05 may come out as 1.9999999999999998)
    tenths = int(np.floor(10 * flux / float(f"1e{CLASS_EXPONENTS[letter]}") + 1e-9))
    return f"{letter}{tenths // 10}.{tenths % 10}"


def flux_to_label(flux: Any) -> np.ndarray:
    """Maps peak irradiances to the ordered classes 0AB, C, M, X.

    Args:
        flux: Peak irradiance(s) in W/m2; NaN means no flare.

    Returns:
        int64 array of the same shape with 0 (none, A or B), 1 (C), 2 (M), 3 (X).
    """
    values = np.nan_to_num(np.asarray(flux, dtype=float), nan=0.0)
    return np.searchsorted([1e-6, 1e-5, 1e-4], values, side="right")


def to_utc(times: Any) -> pd.DatetimeIndex:
    """Reads times as UTC: zone-aware ones are converted, naive ones already mean UTC.

    Args:
        times: A Series, an index, an array, a list, or one time; text in ISO 8601.

    Returns:
        A zone-aware `DatetimeIndex` in UTC, nanosecond resolution.

    Raises:
        ValueError: A time is missing or not readable.
    """
    if isinstance(times, str | pd.Timestamp | np.datetime64) or not np.iterable(times):
        times = [times]
    values = times if isinstance(times, pd.Series | pd.Index | np.ndarray) else list(times)
    index = parse_times(values, str(getattr(values, "name", None) or "times"))
    if index.hasnans:
        raise ValueError(f"times: expected every time to be set, got {int(index.isna().sum())} missing; drop them.")
    return index


def parse_times(values: Any, name: str = "times") -> pd.DatetimeIndex:
    """Times in UTC as `to_utc` gives them; missing ones stay missing.

    Args:
        values: A Series, an index, an array or a list; text in ISO 8601.
        name: What they are, for the message.

    Returns:
        A zone-aware `DatetimeIndex` in UTC, nanosecond resolution.

    Raises:
        ValueError: One is not readable.
    """
    try:
        return pd.DatetimeIndex(pd.to_datetime(values, utc=True, format="ISO8601")).as_unit("ns")
    except (ValueError, TypeError) as error:
        said = " ".join(str(error).partition("You might want")[0].split()).rstrip(".")
        raise ValueError(
            f"{name}: expected times in ISO 8601, such as '2012-01-01 06:00', in UTC or with their zone, got others: "
            f"{said}."
        ) from error


def disk_angle(location: Any) -> np.ndarray:
    """Angle between a flare and the centre of the disk, in degrees.

    Args:
        location: Stonyhurst locations as `"N14E89"`; missing ones allowed.

    Returns:
        float64 array, degrees (0 centre, 90 limb; the solar B0 angle, at most 7.25 degrees, is left out); NaN where
        unknown.
    """
    parts = pd.Series(np.atleast_1d(np.asarray(location, dtype=object))).astype("string")
    parts = parts.str.extract(r"^[NS](\d+)[EW](\d+)$")
    latitude, longitude = (parts[k].astype("Float64").to_numpy(dtype=float, na_value=np.nan) for k in (0, 1))
    return np.degrees(np.arccos(np.cos(np.radians(latitude)) * np.cos(np.radians(longitude))))


def read_flare_events(
    path: str | PathLike | pd.DataFrame | Sequence, *, source: str | None = None, scale: str | None = None
) -> pd.DataFrame:
    """Reads a flare list into one schema, and counts what is wrong with it.

    Known layouts, told apart by their columns: the NOAA/NCEI science-quality flare report (22 columns), a CSV in the
    style of SWPC (`start_time, peak_time, end_time, goes_class, location, noaa_ar`), and a table of flares from HEK as
    sunpy returns it (`Fido.search(...)["hek"]`), of which only the rows recognised by SWPC are kept, since HEK lists
    one flare once per recognition method.

    Rows without a readable start or class cannot be placed or ranked and are dropped. Rows with the same start and
    peak are one flare: the one with most known fields (end, location, region) is kept, among equals the one with the
    larger class, then the first. Impossible times are kept as found: `label_flares` does not rely on them. Everything
    is counted in `attrs["report"]`, and logged when there is anything to report.

    A list says nothing of the days that it does not cover; that is told to `label_flares` by `coverage`.

    Args:
        path: A CSV file (compressed or not), a DataFrame, an astropy or HEK table, or a list of such of one source;
            also a list of HEK's records (dicts).
        source: Overrides the name written to the column `source`.
        scale: Overrides the irradiance scale: `"GOES-R"` for science-quality classes, `"operational"` for those in
            which GOES-8 to -15 are lower by a factor of about 0.7. SWPC's own list is called
            `"operational"` throughout, also for the years in which it reports GOES-R satellites.

    Returns:
        A DataFrame sorted by start with `start_time, peak_time, end_time` (UTC, zone-aware; end and peak may be NaT),
        `goes_class` (as `"M2.0"`), `flux` (the class in W/m2, float64), `location` (as `"N14E89"`, missing where
        unknown), `noaa_ar` (Int64 in five digits, missing where unknown), `source`, `scale`. `attrs["report"]` holds
        counts: `rows_read`, `rows_kept`, `unreadable_times`, `unreadable_classes`, `saturated_classes` (as `"X10+"`,
        a lower bound), `duplicate_rows` (of which `identical_rows`), `peak_after_end`, `end_before_start`,
        `peak_before_start`, `longer_than_12h`, `missing_end`, `missing_location`, `missing_region`,
        `long_lived_regions` (number to days), and for HEK `other_recognition_methods`.

    Raises:
        ValueError: The columns belong to no known layout, or the parts of a list have different scales.
    """
    if isinstance(path, list | tuple) and path and all(isinstance(part, Mapping) for part in path):
        path = pd.DataFrame(list(path))
    if isinstance(path, list | tuple):
        frames = [_to_schema(part, source, scale) for part in path]
        scales = sorted({value for frame in frames for value in frame["scale"].unique()})
        if len(scales) > 1:
            raise ValueError(
                f"flare lists: expected one irradiance scale, got {scales}; read them apart, and do not compare them."
            )
        table = pd.concat(frames, ignore_index=True)
        table.attrs = {"other_recognition_methods": sum(f.attrs["other_recognition_methods"] for f in frames)}
    else:
        table = _to_schema(path, source, scale)
    return _clean(table)


def _load(source: Any) -> tuple[pd.DataFrame, str]:
    """The table as found (all text when from a file) and a name for messages."""
    if isinstance(source, pd.DataFrame):
        return source.copy(), "the given DataFrame"
    if hasattr(source, "colnames"):  # astropy's Table and what sunpy derives from it; multi-dimensional columns stay
        wanted = [name for name in source.colnames if name in (*_HEK_NAMES, "frm_name")]
        return pd.DataFrame({name: _plain_column(source[name]) for name in wanted}), "the given table"
    try:
        return pd.read_csv(Path(source), dtype=str, skipinitialspace=True, comment="#"), str(source)
    except ValueError as error:  # binary, empty, or rows of other lengths
        raise ValueError(f"{source}: expected a flare list as CSV with a header line, got {error}") from error


def _plain_column(column: Any) -> pd.Series:
    """A column of an astropy table, its masked values missing."""
    values = np.asarray(getattr(column, "datetime64", column))
    return pd.Series(values).mask(np.broadcast_to(np.asarray(getattr(column, "mask", False)), values.shape))


def _to_schema(path: Any, source: str | None, scale: str | None) -> pd.DataFrame:
    table, name = _load(path)
    dropped = 0
    if {"flare_class", "start_time", "time"} <= set(table.columns):
        found, found_scale = "NOAA/NCEI", "GOES-R"
        table = table.rename(columns=_NCEI_NAMES)
        satellites = table.get("xrsb_irrad_source", pd.Series(dtype=str)).astype("string")
        if len(satellites) and satellites.str.contains("synthetic", case=False).fillna(False).all():
            found = "synthetic"
    elif {"fl_goescls", "event_starttime"} <= set(table.columns):
        found, found_scale = "HEK", "operational"
        table = table.rename(columns=_HEK_NAMES)
        if "frm_name" in table:
            by_swpc = table["frm_name"].astype("string").str.strip().eq("SWPC").fillna(False)
            dropped, table = int((~by_swpc).sum()), table[by_swpc]
    elif {"start_time", "peak_time", "goes_class"} <= set(table.columns):
        found, found_scale = "NOAA/SWPC", "operational"
    else:
        raise ValueError(
            f"{name}: expected the columns of the NOAA/NCEI flare report (time, start_time, flare_class, ...), of an "
            "SWPC list (start_time, peak_time, goes_class, ...) or of HEK (event_starttime, fl_goescls, ...), "
            f"got {list(table.columns)}."
        )

    events = pd.DataFrame(index=table.index)
    for column in ("start_time", "peak_time", "end_time"):
        values = table[column] if column in table else pd.Series(pd.NaT, index=table.index)
        events[column] = pd.to_datetime(values, utc=True, errors="coerce", format="ISO8601").dt.as_unit("ns")
    parts = _class_parts(table["goes_class"])
    # "C" and "M2" are written as "C1.0" and "M2.0", which says the same
    tenths = parts[1].fillna("1").str.removesuffix(".").str.replace(r"^(\d+)$", r"\1.0", regex=True)
    events["goes_class"] = (parts[0] + tenths).astype("str")
    events["flux"] = parse_goes_class(events["goes_class"])
    events["saturated"] = parts[2].notna()
    events["location"] = _locations(table)
    events["noaa_ar"] = _regions(table, events["start_time"])
    # A table written by us keeps what it was read from.
    events["source"] = source or table.get("source", found)
    events["scale"] = scale or table.get("scale", found_scale)
    events.attrs = {"other_recognition_methods": dropped}
    return events.reset_index(drop=True)


def _locations(table: pd.DataFrame) -> pd.Series:
    location = pd.Series(pd.NA, index=table.index, dtype="string")
    if "location" in table:
        location = table["location"].astype("string").str.strip().replace("", pd.NA)
    for latitude_name, longitude_name in _LOCATION_PAIRS:
        if latitude_name in table and longitude_name in table:
            latitude, longitude = (pd.to_numeric(table[n], errors="coerce") for n in (latitude_name, longitude_name))
            known = latitude.notna() & longitude.notna()
            text = np.where(latitude < 0, "S", "N") + _two_digits(latitude)
            text = text + np.where(longitude < 0, "E", "W") + _two_digits(longitude)
            location = location.fillna(text.where(known))
    return location.astype("str")


def _two_digits(degrees: pd.Series) -> pd.Series:
    return degrees.abs().round().fillna(0).astype(int).astype(str).str.zfill(2)


def _regions(table: pd.DataFrame, start: pd.Series) -> pd.Series:
    if "noaa_ar" not in table:
        return pd.Series(pd.NA, index=table.index, dtype="Int64")
    region = pd.to_numeric(table["noaa_ar"], errors="coerce").astype("Float64").round().astype("Int64")
    region = region.mask(region <= 0)
    four_digits = (region < 10000) & (start >= _REGION_ROLLOVER)
    return region.mask(four_digits.fillna(False), region + 10000)


def _clean(table: pd.DataFrame) -> pd.DataFrame:
    report: dict[str, Any] = {"rows_read": len(table), **table.attrs}
    table.attrs = {}
    bad_time, bad_class = table["start_time"].isna(), table["flux"].isna()
    report["unreadable_times"], report["unreadable_classes"] = int(bad_time.sum()), int(bad_class.sum())
    events = table[~(bad_time | bad_class)]
    report["saturated_classes"] = int(events.pop("saturated").sum())

    # Counted on the rows as found, duplicates included.
    report["duplicate_rows"] = int(events.duplicated(["start_time", "peak_time"]).sum())
    report["identical_rows"] = int(events.duplicated().sum())
    report["peak_after_end"] = int((events["peak_time"] > events["end_time"]).sum())
    report["peak_before_start"] = int((events["peak_time"] < events["start_time"]).sum())
    report["end_before_start"] = int((events["end_time"] < events["start_time"]).sum())
    report["longer_than_12h"] = int((events["end_time"] - events["start_time"] > MAX_DURATION).sum())
    for field, column in (("end", "end_time"), ("location", "location"), ("region", "noaa_ar")):
        report[f"missing_{field}"] = int(events[column].isna().sum())
    spans = (
        events.dropna(subset="noaa_ar").groupby("noaa_ar")["start_time"].agg(lambda times: times.max() - times.min())
    )
    long_lived = spans[spans > MAX_REGION_LIFE] if len(spans) else {}
    report["long_lived_regions"] = {str(k): round(v / pd.Timedelta("1D"), 1) for k, v in long_lived.items()}

    known = events[["end_time", "location", "noaa_ar"]].notna().sum(axis=1)
    order = events.assign(known=known, row=np.arange(len(events)))
    order = order.sort_values(
        ["start_time", "peak_time", "known", "flux", "row"], ascending=[True, True, False, False, True]
    )
    events = order.drop_duplicates(["start_time", "peak_time"])[list(EVENT_COLUMNS)].reset_index(drop=True)
    report["rows_kept"] = len(events)
    events.attrs["report"] = report
    faults = {
        k: len(v) if isinstance(v, dict) else v
        for k, v in report.items()
        if v and not k.startswith(("rows", "missing"))
    }
    if faults:
        logger.warning("flare list: %d of %d rows kept; found %s", report["rows_kept"], report["rows_read"], faults)
    return events


__all__ = [
    "CLASS_EXPONENTS",
    "EVENT_COLUMNS",
    "MAX_DURATION",
    "disk_angle",
    "flux_to_label",
    "format_goes_class",
    "parse_goes_class",
    "parse_times",
    "read_flare_events",
    "to_utc",
]
