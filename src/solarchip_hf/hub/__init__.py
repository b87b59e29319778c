"""What goes to the Hub and what comes from elsewhere: exports with code, cards, conversions.

Names are loaded on first use.
"""

import importlib
from typing import Any

_HOMES = {"convert_checkpoint": ".convert", "save_with_code": ".remote_code"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


__all__ = ["convert_checkpoint", "save_with_code"]
