"""From an archive of FITS files to paired observations on a common grid.

Names are loaded on first use: importing this package costs nothing and asks for none of astropy, dask or datasets.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "SolarImage": "..models.headers",
    "SolarImageError": "..models.headers",
    "read_image": "..models.readers",
    "scan_archive": ".catalog",
    "read_catalog": ".catalog",
    "download_sdo": ".download",
    "scan_sdoml": ".sdoml",
    "scan_surya": ".surya",
    "pair_observations": ".pairing",
    "prepare_dataset": ".preparation",
    "Observations": ".observations",
    "load_observations": ".observations",
    "ObservationStream": ".streaming",
    "chronological_split": ".splits",
    "split_labels": ".splits",
    "blocked_folds": ".splits",
    "read_flare_events": ".flare_events",
    "parse_goes_class": ".flare_events",
    "format_goes_class": ".flare_events",
    "disk_angle": ".flare_events",
    "label_flares": ".flare_labels",
    "label_calendar_days": ".flare_labels",
    "past_features": ".flare_labels",
    "trailing_day_rates": ".flare_labels",
    "FlareObservations": ".flare_observations",
    "label_observations": ".flare_observations",
    "split_flares": ".flare_observations",
    "choose_blocks": ".flare_observations",
    "load_flare_parts": ".flare_preparation",
    "prepare_flare_archive": ".flare_preparation",
    "LeakageError": ".leakage",
    "check_feature_table": ".leakage",
    "check_past_features": ".leakage",
    "SyntheticSun": ".synthetic_sun",
}

if TYPE_CHECKING:
    from ..models.headers import SolarImage, SolarImageError
    from ..models.readers import read_image
    from .catalog import read_catalog, scan_archive
    from .download import download_sdo
    from .flare_events import disk_angle, format_goes_class, parse_goes_class, read_flare_events
    from .flare_labels import label_calendar_days, label_flares, past_features, trailing_day_rates
    from .flare_observations import FlareObservations, choose_blocks, label_observations, split_flares
    from .flare_preparation import load_flare_parts, prepare_flare_archive
    from .leakage import LeakageError, check_feature_table, check_past_features
    from .observations import Observations, load_observations
    from .pairing import pair_observations
    from .preparation import prepare_dataset
    from .sdoml import scan_sdoml
    from .splits import blocked_folds, chronological_split, split_labels
    from .streaming import ObservationStream
    from .surya import scan_surya
    from .synthetic_sun import SyntheticSun


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


__all__ = [
    "FlareObservations",
    "LeakageError",
    "ObservationStream",
    "Observations",
    "SolarImage",
    "SolarImageError",
    "SyntheticSun",
    "check_feature_table",
    "check_past_features",
    "blocked_folds",
    "choose_blocks",
    "chronological_split",
    "download_sdo",
    "disk_angle",
    "format_goes_class",
    "label_calendar_days",
    "label_flares",
    "label_observations",
    "load_flare_parts",
    "load_observations",
    "pair_observations",
    "parse_goes_class",
    "past_features",
    "prepare_dataset",
    "prepare_flare_archive",
    "read_catalog",
    "read_flare_events",
    "read_image",
    "scan_archive",
    "scan_sdoml",
    "scan_surya",
    "split_flares",
    "split_labels",
    "trailing_day_rates",
]
