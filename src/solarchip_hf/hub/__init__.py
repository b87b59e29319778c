"""What goes to the Hub and what comes from elsewhere: exports with code, cards, conversions.

Names are loaded on first use.
"""

import importlib
from typing import Any

_HOMES = {
    "CardResult": ".card_results",
    "EndpointHandler": ".handler",
    "FlareAttribution": ".attribution",
    "SolarFlareForecastingPipeline": ".flare_pipeline",
    "convert_checkpoint": ".convert",
    "forecast_figure": ".flare_figures",
    "push_folder": ".publish",
    "push_to_hub": ".publish",
    "save_with_code": ".remote_code",
    "write_card": ".cards",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


__all__ = [
    "CardResult",
    "EndpointHandler",
    "FlareAttribution",
    "SolarFlareForecastingPipeline",
    "convert_checkpoint",
    "forecast_figure",
    "push_folder",
    "push_to_hub",
    "save_with_code",
    "write_card",
]
