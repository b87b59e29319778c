"""Lengths and points of time as users write them."""

import re
from typing import Any

import numpy as np
import pandas as pd


def read_duration(value: Any, name: str, *, zero: bool = False) -> pd.Timedelta:
    """Reads a length of time, as "6min", "24h" or "27D".

    Args:
        value: Text, or anything else that pandas takes for a length of time.
        name: The argument it was given for, for the message.
        zero: Whether none at all will do.

    Returns:
        The length.

    Raises:
        ValueError: It is no length of time, a number without a unit, or none at all or less.
    """
    try:
        length = pd.Timedelta(value)
        if length and re.fullmatch(r"[\s\d.+-]+", str(value)):  # pandas would count nanoseconds
            length = pd.NaT
    except (ValueError, TypeError):
        length = pd.NaT
    if not (length > pd.Timedelta(0) or (zero and length == pd.Timedelta(0))):
        kind = "time of zero or more" if zero else "positive time"
        raise ValueError(f"{name}: expected a {kind} such as '6min', '24h' or '27D', got {str(value)!r}.")
    return length


def read_time(value: Any, name: str) -> pd.Timestamp:
    """Reads a date, or a date with a time, as "2014-06-01" or "2014-06-01T06:00".

    Args:
        value: Text with a year of four digits, or a date or time of Python, NumPy or pandas.
        name: The argument it was given for, for the message.

    Returns:
        The time, in UTC; given without a zone it is UTC, given in another zone it is converted.

    Raises:
        ValueError: It is no point in time.
    """
    # of a day or a clock time alone pandas would make a date all the same, and of a number nanoseconds since 1970
    if isinstance(value, str):
        dated = re.search(r"(?<!\d)(?:\d{4}|\d{8})(?!\d)", value) is not None
    else:
        dated = not isinstance(value, int | float | np.number)
    try:
        stamp = pd.Timestamp(value if dated else None)
    except (ValueError, TypeError):
        stamp = pd.NaT
    if pd.isna(stamp):
        raise ValueError(
            f"{name}: expected a date or a time in UTC, such as '2014-06-01' or '2014-06-01T06:00', got {str(value)!r}."
        )
    return stamp.tz_localize("UTC") if stamp.tzinfo is None else stamp.tz_convert("UTC")


def write_duration(length: Any) -> str:
    """Writes a length of time in whole hours, as "24h", or else in minutes, as "90min"."""
    hours, rest = divmod(pd.Timedelta(length), pd.Timedelta("1h"))
    return f"{pd.Timedelta(length) / pd.Timedelta('1min'):.10g}min" if rest else f"{hours}h"


__all__ = ["read_duration", "read_time", "write_duration"]
