"""Statistics of the transformed images: the published table, the approximate class default, and their keys."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .modalities import MODALITIES
from .photometry import physical_unit

STATISTICS_KEYS = ("photometry", "degradation", "geometry", "size", "scaling")

# Mean and standard deviation of sign(x) log(1 + |x|) over whole 1024 px frames, off-disk NaN as 0; raw DN and gauss,
# one observation a day, 2010-05-01 to 2024-01-07. Source: SolarCHIP's research code (arXiv 2511.22958).
_PUBLISHED = {
    "hmi": (-0.00336441, 1.44624682),
    "aia94": (0.77771744, 0.66878245),
    "aia131": (1.53908228, 1.09124352),
    "aia171": (4.05845461, 2.00199555),
    "aia193": (4.20858573, 2.03135411),
    "aia211": (3.45672005, 1.83300930),
    "aia304": (1.70232003, 1.43015436),
    "aia335": (0.91731731, 0.83857823),
    "aia1600": (2.73347349, 1.80482735),
    "aia1700": (4.48201001, 2.26296504),
    "aia4500": (6.43315257, 3.16857583),
}

# From the whole frame in raw DN to the circle inscribed in the canonical frame: added to the mean and multiplied on
# the standard deviation, for DN and for DN/s. Measured on the eight AIA synoptic files of 2024-10-04 16:17 UTC; 94 and
# 4500 had no file there and take the figures of 335 and 1700.
_TO_CIRCLE = {
    "aia131": (0.437, 0.808, -0.394, 0.672),
    "aia171": (0.730, 0.654, 0.049, 0.646),
    "aia193": (0.760, 0.583, 0.073, 0.580),
    "aia211": (0.693, 0.609, -0.351, 0.598),
    "aia304": (0.464, 0.841, -0.285, 0.634),
    "aia335": (0.321, 0.892, -0.367, 0.683),
    "aia1600": (0.512, 0.864, -0.397, 0.749),
    "aia1700": (0.655, 0.758, 0.655, 0.758),
}
_TO_CIRCLE |= {"aia94": _TO_CIRCLE["aia335"], "aia4500": _TO_CIRCLE["aia1700"]}

# The published figure of HMI counts the zeros off the disk, which fills .678 of HMI's frame: on the disk the deviation
# is 1.446 / sqrt(.678). It falls with the image's size, since averaging cancels polarities: ratios to 1024 px measured
# on the disk of an HMI magnetogram of 2022-08-02 (1024 to 512) and of SDOML's of 2013-01-31 (512 to 64).
_HMI_DISK_STD_1024 = 1.755
_HMI_SIZES = (64, 128, 256, 512, 1024)
_HMI_SIZE_RATIO = (0.636, 0.695, 0.787, 0.917, 1.0)


def published_statistics() -> dict[str, Any]:
    """The published statistics with their key: raw DN and gauss, no geometry, 1024 px."""
    return {
        "photometry": "dn",
        "degradation": None,
        "geometry": "none",
        "size": 1024,
        "scaling": "log1p",
        "source": "SolarCHIP research code (arXiv 2511.22958): whole frames, 2010-05-01 to 2024-01-07",
        "modalities": {
            name: {"mean": mean, "std": std, "unit": MODALITIES[name].unit} for name, (mean, std) in _PUBLISHED.items()
        },
    }


def approximate_statistics(key: Mapping[str, Any]) -> dict[str, Any] | None:
    """Approximate statistics for a processor's settings; None where nothing is known for them.

    They serve until a prepared dataset brings its own. Means and deviations are the published ones, moved from the
    whole frame to the pixels that count (on the disk for HMI, within the inscribed circle for AIA).

    Args:
        key: Values for `STATISTICS_KEYS`.

    Returns:
        A statistics mapping whose `source` starts with "approximate".
    """
    if key["scaling"] != "log1p" or key["degradation"] is not None:
        return None
    whole_frame = key["geometry"] == "none"
    if whole_frame and key["photometry"] == "dn_per_s":
        return None
    ratio = float(np.interp(math.log2(key["size"]), np.log2(_HMI_SIZES), _HMI_SIZE_RATIO))
    modalities = {}
    for name, (mean, std) in _PUBLISHED.items():
        if name == "hmi":
            std = (std if whole_frame else _HMI_DISK_STD_1024) * ratio
        elif not whole_frame:
            shift, factor = _TO_CIRCLE[name][2:] if key["photometry"] == "dn_per_s" else _TO_CIRCLE[name][:2]
            mean, std = mean + shift, std * factor
        unit = physical_unit(name, key["photometry"])
        modalities[name] = {"mean": round(mean, 4), "std": round(std, 4), "unit": unit}
    source = "approximate: published statistics, moved to the canonical grid by figures measured on single days"
    return {**{name: key[name] for name in STATISTICS_KEYS}, "source": source, "modalities": modalities}


def is_approximate(statistics: Mapping[str, Any]) -> bool:
    """Whether the statistics are the class default rather than computed on a dataset."""
    return str(statistics.get("source", "")).startswith("approximate")


def check_statistics(statistics: Mapping[str, Any], key: Mapping[str, Any], modalities: list[str]) -> dict[str, Any]:
    """Refuses statistics that belong to other settings or lack a modality.

    Returns:
        A copy, whose means and deviations are plain floats.

    Raises:
        ValueError: With the key at fault, what the processor has and what the statistics have.
    """
    for name in STATISTICS_KEYS:
        if name not in statistics:
            raise ValueError(f"statistics: expected the keys {', '.join(STATISTICS_KEYS)}, got none for {name!r}.")
        if statistics[name] != key[name]:
            raise ValueError(
                f"statistics: expected {name}={key[name]!r} as the processor has, got {name}={statistics[name]!r} "
                f"(source: {statistics.get('source', 'unknown')}). Statistics hold for their own settings only: "
                "compute them anew on your dataset, or pass statistics=None for approximate ones."
            )
    rows = {name: dict(row) for name, row in statistics.get("modalities", {}).items()}
    for name in modalities:
        if name not in rows:
            raise ValueError(f"statistics: expected an entry for {name!r}, got {', '.join(rows) or 'none'}.")
        row = rows[name]
        if not {"mean", "std", "unit"} <= set(row):
            raise ValueError(f"statistics: expected mean, std and unit for {name!r}, got {row}.")
        row["mean"], row["std"] = float(row["mean"]), float(row["std"])
        if not (math.isfinite(row["mean"]) and math.isfinite(row["std"]) and row["std"] > 0):
            raise ValueError(f"statistics: expected a finite mean and a positive std for {name!r}, got {row}.")
        unit = physical_unit(name, key["photometry"])
        if row["unit"] != unit:
            raise ValueError(f"statistics: expected unit {unit!r} for {name!r}, got {row['unit']!r}.")
    return {**statistics, "modalities": rows}


__all__ = [
    "STATISTICS_KEYS",
    "approximate_statistics",
    "check_statistics",
    "is_approximate",
    "published_statistics",
]
