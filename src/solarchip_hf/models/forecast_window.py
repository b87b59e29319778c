"""The window that a flare model forecasts, as its configuration carries it.

    {"horizon": "24h", "latency": "0h", "by": "start"}

The window begins `latency` after the observation's nominal time and is `horizon` long; a flare belongs to it by its
start or by its peak. A configuration without one means these values.
"""

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

DEFAULT_WINDOW = {"horizon": "24h", "latency": "0h", "by": "start"}
_UNITS = {"min": "minutes", "h": "hours", "D": "days"}


def read_window(window: Mapping[str, Any] | None) -> tuple[timedelta, timedelta, str]:
    """Reads a window.

    Args:
        window: As in the text of this module; what is left out, or None, has the values there.

    Returns:
        Horizon, latency, and `"start"` or `"peak"`.

    Raises:
        ValueError: Another key, a length that cannot be read, no horizon, or another `by`.
    """
    if window is not None and (not isinstance(window, Mapping) or set(window) - set(DEFAULT_WINDOW)):
        raise ValueError(f"forecast_window: expected a dict of {', '.join(DEFAULT_WINDOW)}, got {window!r}.")
    told = {**DEFAULT_WINDOW, **(window or {})}
    horizon, latency = _length(told["horizon"]), _length(told["latency"])
    if not horizon:
        raise ValueError(f"forecast_window.horizon: expected a positive time as '24h', got {told['horizon']!r}.")
    if latency is None:
        raise ValueError(f"forecast_window.latency: expected a time as '0h' or '90min', got {told['latency']!r}.")
    if told["by"] not in ("start", "peak"):
        raise ValueError(f"forecast_window.by: expected 'start' or 'peak', got {told['by']!r}.")
    return horizon, latency, told["by"]


def _length(text: Any) -> timedelta | None:
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?) ?(min|h|D)", text, re.ASCII) if isinstance(text, str) else None
    return timedelta(**{_UNITS[found[2]]: float(found[1])}) if found else None


__all__ = ["DEFAULT_WINDOW", "read_window"]
