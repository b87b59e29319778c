"""Header cards as plain Python values: robust look-up, and the time stamps of SDO and SOHO."""

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

# First UTC instant at which TAI - UTC has the value, in seconds (IERS Bulletin C). Older dates precede SOHO and SDO.
_LEAP_SECONDS = (
    (datetime(2017, 1, 1), 37),
    (datetime(2015, 7, 1), 36),
    (datetime(2012, 7, 1), 35),
    (datetime(2009, 1, 1), 34),
    (datetime(2006, 1, 1), 33),
    (datetime(1999, 1, 1), 32),
    (datetime(1997, 7, 1), 31),
    (datetime(1996, 1, 1), 30),
)

# 2024-10-04T16:17:57.354, 2024.01.01_00:00:00_TAI, 2014-01-01T00:00:12.34Z, 2013/03/10 12:00, 2011-02-15
_TIME = re.compile(
    r"(?P<date>\d{4}[-./]\d{1,2}[-./]\d{1,2})"
    r"(?:[T_ ]+(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{1,2}(?:\.\d*)?))?)?"
    r"[_ ]*(?P<scale>Z|UTC|UT|TAI|\+00:?00)?",
    re.IGNORECASE,
)

# CREATOR of the images that the translation pipeline writes.
GENERATING_PROGRAM = "solarchip_hf.SolarChipControlNetPipeline"

# Cards that describe how a file stores its image rather than the image, and those of the compressing table.
_STORAGE = re.compile(
    r"SIMPLE|XTENSION|EXTEND|PCOUNT|GCOUNT|TFIELDS|THEAP|EXTNAME|CHECKSUM|DATASUM|END|"
    r"T(TYPE|FORM|UNIT|NULL|SCAL|ZERO|DISP|DIM)\d+|Z(IMAGE|SIMPLE|BITPIX|CMPTYPE|TENSION|EXTEND|PCOUNT|GCOUNT|"
    r"HECKSUM|DATASUM|QUANTIZ|DITHER0|BLANK|MASKCMP|NAXIS\d*|TILE\d+|NAME\d+|VAL\d+)"
)


def card(header: Mapping[str, Any], *names: str) -> Any:
    """The first card among `names` that holds a value.

    Args:
        header: Anything with `get`: a dict, an astropy `Header`, the `meta` of a sunpy Map; upper or lower case.
        *names: Card names in upper case, in the order of preference.

    Returns:
        A `str` without outer blanks, `bool`, `int` or `float`; None where every card is absent, empty or NaN.
    """
    for name in names:
        value = plain_value(header.get(name, header.get(name.lower())))
        if value is not None and value != "":
            return value
    return None


def number(header: Mapping[str, Any], *names: str) -> float | None:
    """The first finite number among the cards, numbers written as text included; None where there is none."""
    for name in names:
        value = card(header, name)
        if value is None or isinstance(value, bool):
            continue
        try:
            parsed = float(value)
        except ValueError:
            continue
        if math.isfinite(parsed):
            return parsed
    return None


def text(header: Mapping[str, Any], *names: str) -> str:
    """The first filled card among `names` as text; empty where there is none."""
    value = card(header, *names)
    return "" if value is None else str(value).strip()


def plain_value(value: Any) -> Any:
    """A card's value as `str`, `bool`, `int`, `float` or None, ready for JSON."""
    if hasattr(value, "item") and not isinstance(value, str):  # a NumPy scalar
        value = value.item()
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return None if value is None or type(value).__name__ == "Undefined" else str(value)


def is_storage_card(name: str) -> bool:
    """Whether a card describes the storage (table columns, checksums, compression) rather than the image."""
    return _STORAGE.fullmatch(name) is not None


def plain_cards(header: Mapping[str, Any]) -> dict[str, Any]:
    """All cards that describe the image, upper case, JSON-ready; the first of duplicated cards counts.

    Args:
        header: A dict or the `meta` of a sunpy Map. An astropy `Header` goes through `plain_header` of `fits_files`.

    Returns:
        Card name to value, storage cards (table columns, checksums, compression) left out.
    """
    cards: dict[str, Any] = {}
    for name, value in header.items():
        name = str(name).upper().strip()
        if name and name not in cards and not is_storage_card(name) and name != "KEYCOMMENTS":
            cards[name] = plain_value(value)
    return cards


def calendar_time(stamp: str) -> tuple[datetime, str]:
    """Reads a time stamp as written.

    Args:
        stamp: As `2024.01.01_00:00:00_TAI`, `2014-01-01T00:00:12.34Z`, `2024-10-04T16:17:57.354`, `2011-02-15`.

    Returns:
        The calendar time without a zone, and its time scale: `"TAI"`, `"UTC"`, or `""` where none is given.

    Raises:
        ValueError: The stamp has no known form (as JSOC's mark of a missing time, `-4712.01.01_11:59:28_TAI`).
    """
    match = _TIME.fullmatch(stamp.strip())
    if not match:
        raise ValueError(f"time stamp: expected a form such as 2024.01.01_00:00:00_TAI or ISO 8601, got {stamp!r}.")
    year, month, day = (int(part) for part in re.split(r"[-./]", match["date"]))
    moment = datetime(year, month, day)  # seconds are added, so that a leap second (60) is no error
    moment += timedelta(
        hours=int(match["hour"] or 0), minutes=int(match["minute"] or 0), seconds=float(match["second"] or 0)
    )
    scale = (match["scale"] or "").upper()
    return moment, scale if scale in ("", "TAI") else "UTC"


def parse_time(stamp: str, *, default_scale: str = "UTC") -> datetime:
    """Reads a time stamp into UTC.

    Args:
        stamp: A time stamp as `calendar_time` takes it.
        default_scale: `"UTC"` or `"TAI"`, for a stamp that does not say.

    Returns:
        Time-zone aware datetime in UTC.

    Raises:
        ValueError: The stamp has no known form, or a TAI stamp precedes 1996.
    """
    moment, scale = calendar_time(stamp)
    if (scale or default_scale) == "TAI":
        for start, offset in _LEAP_SECONDS:
            if moment - timedelta(seconds=offset) >= start:
                moment -= timedelta(seconds=offset)
                break
        else:
            raise ValueError(f"TAI time stamp: expected 1996 or later, got {stamp!r}.")
    return moment.replace(tzinfo=UTC)


def try_time(header: Mapping[str, Any], *names: str, default_scale: str = "UTC") -> datetime | None:
    """The first card among `names` that holds a time, in UTC; None where none does.

    A date alone takes its time of day from the card beside it (TIME-OBS beside DATE-OBS), as older files write it.
    """
    for name in names:
        stamp = text(header, name)
        beside = text(header, name.replace("DATE", "TIME"))
        if "DATE" in name and beside and ":" not in stamp:
            stamp = f"{stamp}T{beside}"
        try:
            if stamp:
                return parse_time(stamp, default_scale=default_scale)
        except ValueError:
            continue
    return None


def instrument_of(header: Mapping[str, Any]) -> str:
    """The instrument's name in upper case: `"AIA"`, `"HMI"`, `"MDI"`, else INSTRUME or TELESCOP as given, or `""`."""
    written = " ".join(text(header, name).upper() for name in ("INSTRUME", "TELESCOP", "DETECTOR"))
    for known in ("AIA", "HMI", "MDI"):
        if re.search(rf"(?<![A-Z]){known}(?![A-Z])", written.replace("_", " ")):
            return known
    if text(header, "CAMERA").upper() == "MDI" or text(header, "CONTENT").upper().startswith("MDI"):
        return "MDI"
    return text(header, "INSTRUME", "TELESCOP").upper()


def generator_of(header: Mapping[str, Any]) -> str:
    """The model that drew a generated image, as MODEL names it; empty for an observed (or simulated) one."""
    if card(header, "GENERATD") is not True and text(header, "CREATOR") != GENERATING_PROGRAM:
        return ""
    return text(header, "MODEL") or "unnamed"


def is_helioprojective(header: Mapping[str, Any]) -> bool:
    """Whether the axes are helioprojective (seen by the observer), not a map projection such as `CRLN-CEA`."""
    first, second = (text(header, name).upper().replace("_", "").replace("-", "") for name in ("CTYPE1", "CTYPE2"))
    if not (first or second):
        return True  # sunpy's and our assumption where the header does not say
    return first.startswith(("HPLN", "SOLARX")) and second.startswith(("HPLT", "SOLARY"))


__all__ = [
    "GENERATING_PROGRAM",
    "calendar_time",
    "card",
    "generator_of",
    "instrument_of",
    "is_helioprojective",
    "is_storage_card",
    "number",
    "parse_time",
    "plain_cards",
    "plain_value",
    "text",
    "try_time",
]
