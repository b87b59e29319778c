"""Lengths of time as users write them."""

from typing import Any

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
        ValueError: It is no length of time, or none at all or less.
    """
    try:
        length = pd.Timedelta(value)
    except (ValueError, TypeError):
        length = pd.NaT
    if not (length > pd.Timedelta(0) or (zero and length == pd.Timedelta(0))):
        kind = "time of zero or more" if zero else "positive time"
        raise ValueError(f"{name}: expected a {kind} such as '6min', '24h' or '27D', got {str(value)!r}.")
    return length


def write_duration(length: Any) -> str:
    """Writes a length of time in whole hours, as "24h", or else in minutes, as "90min"."""
    hours, rest = divmod(pd.Timedelta(length), pd.Timedelta("1h"))
    return f"{pd.Timedelta(length) / pd.Timedelta('1min'):.10g}min" if rest else f"{hours}h"


__all__ = ["read_duration", "write_duration"]
