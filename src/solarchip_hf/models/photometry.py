"""Exposure and degradation: from the archive's DN to the named photometric quantity."""

import csv
import json
import os
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from .headers import SolarImage, SolarImageError
from .modalities import MODALITIES, resolve_modality

# nominal: DN x T0 / EXPTIME with the channel's nominal exposure T0; dn: as in the archive; dn_per_s: DN / EXPTIME.
PHOTOMETRIES = ("nominal", "dn", "dn_per_s")
# A throughput below this leaves noise and offsets divided by almost nothing.
SMALLEST_DEGRADATION_FACTOR = 0.02


def physical_unit(modality: str, photometry: str) -> str:
    """Unit of a modality's canonical image: `"G"`, `"DN"` or `"DN/s"`."""
    unit = MODALITIES[modality].unit
    return "DN/s" if unit == "DN" and photometry == "dn_per_s" else unit


def photometric_factor(image: SolarImage, modality: str, photometry: str) -> float:
    """Factor that takes an image's values to the photometric quantity asked for.

    Args:
        image: The image with its unit and exposure.
        modality: Name from `MODALITIES`.
        photometry: One of `PHOTOMETRIES`.

    Returns:
        The factor; 1 for HMI, whose gauss know no exposure.

    Raises:
        SolarImageError: The unit does not fit the modality, or EXPTIME is needed and missing.
    """
    row = MODALITIES[modality]
    if row.unit == "G":
        if image.unit != "G":
            raise SolarImageError(
                image.source, "BUNIT", "gauss for a magnetogram", repr(image.unit), "Give the header its BUNIT."
            )
        return 1.0
    if image.unit not in ("DN", "DN/s"):
        raise SolarImageError(
            image.source, "BUNIT", f"DN or DN/s for {modality}", repr(image.unit), "Give the header its BUNIT."
        )
    counts = image.unit == "DN"
    needs_exposure = counts != (photometry == "dn")
    exposure = image.exposure
    if needs_exposure and not (exposure is not None and 1e-3 < exposure < 1e3):
        raise SolarImageError(
            image.source,
            "EXPTIME",
            f"an exposure time in seconds for photometry={photometry!r}",
            "no such card" if exposure is None else f"{exposure}",
            "Use photometry='dn' if the values shall stay as they are.",
        )
    seconds = exposure or 1.0  # checked above where it counts
    if photometry == "nominal":
        return (row.nominal_exposure or 1.0) / (seconds if counts else 1.0)
    if photometry == "dn_per_s":
        return 1 / seconds if counts else 1.0
    return 1.0 if counts else seconds


def load_degradation(table: str | os.PathLike | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Reads a named table of throughput factors.

    Args:
        table: None; a path to a CSV (columns `modality, date, factor`) or JSON file; or a mapping
            `{"name": str, "factors": {modality: {"2010-05-13": 1.0, ...}}}`. A file's name is its stem unless it
            names itself. A factor is the throughput relative to launch, by which an image is divided.

    Returns:
        The mapping, JSON-able, with dates sorted; None for None.

    Raises:
        ValueError: The table has no name or no dates, or keys that are no dates, or other columns.
    """
    if table is None:
        return None
    if isinstance(table, str | os.PathLike):
        path = Path(table)
        if not path.is_file():
            raise ValueError(
                f"degradation: expected a mapping or the path of a CSV or JSON table, got {str(table)!r}, which is no "
                "file."
            )
        if path.suffix.lower() == ".json":
            table = {"name": path.stem, **json.loads(path.read_text(encoding="utf-8"))}
        else:
            factors: dict[str, dict[str, float]] = {}
            with path.open(encoding="utf-8", newline="") as stream:
                rows = csv.DictReader(stream)
                if not {"modality", "date", "factor"} <= set(rows.fieldnames or ()):
                    raise ValueError(
                        f"degradation: expected the columns modality, date, factor in {path}, got {rows.fieldnames}."
                    )
                for row in rows:
                    factors.setdefault(row["modality"], {})[row["date"]] = float(row["factor"])
            table = {"name": path.stem, "factors": factors}
    if not table.get("name") or not table.get("factors"):
        raise ValueError(f"degradation: expected a table with 'name' and 'factors', got keys {sorted(table)}.")
    merged: dict[str, dict[str, float]] = {}
    for alias, dates in table["factors"].items():
        merged.setdefault(resolve_modality(alias), {}).update({day: float(factor) for day, factor in dates.items()})
    try:
        cleaned = {
            name: {day: dates[day] for day in sorted(dates, key=date.fromisoformat)} for name, dates in merged.items()
        }
    except (TypeError, ValueError) as error:
        raise ValueError(f"degradation: expected dates such as '2010-05-13', got another key: {error}.") from error
    for name, dates in cleaned.items():
        if len(dates) < 2:
            raise ValueError(f"degradation: expected at least two dates for {name}, got {len(dates)}.")
    return {"name": str(table["name"]), "factors": cleaned}


def degradation_factor(image: SolarImage, modality: str, table: Mapping[str, Any] | None) -> float:
    """Throughput of a channel at the image's time, linear between the table's dates; 1 without a table or for HMI.

    Raises:
        SolarImageError: The channel or the date is not in the table, or the factor is below 0.02.
    """
    if table is None or MODALITIES[modality].instrument == "hmi":
        return 1.0
    name, dates = table["name"], table["factors"].get(modality)
    if dates is None:
        raise SolarImageError(
            image.source,
            "degradation",
            f"a channel of the table {name!r} ({', '.join(table['factors'])})",
            modality,
            "Use degradation=None or another table.",
        )
    if image.time is None:
        raise SolarImageError(image.source, "DATE-OBS", f"an observation time for the table {name!r}", "none")
    moments = [datetime.combine(date.fromisoformat(day), datetime.min.time(), UTC).timestamp() for day in dates]
    factors, now = list(dates.values()), image.time.timestamp()
    if not moments[0] <= now <= moments[-1]:
        first, *_, last = dates
        raise SolarImageError(
            image.source, "DATE-OBS", f"a date within the degradation table {name!r}, {first} to {last}",
            image.time.isoformat(), "The table is not extrapolated.",
        )  # fmt: skip
    after = next((index for index, moment in enumerate(moments) if moment >= now and index), len(moments) - 1)
    share = (now - moments[after - 1]) / (moments[after] - moments[after - 1])
    factor = factors[after - 1] + share * (factors[after] - factors[after - 1])
    if not factor >= SMALLEST_DEGRADATION_FACTOR:
        raise SolarImageError(
            image.source,
            "degradation",
            f"a throughput of at least {SMALLEST_DEGRADATION_FACTOR} for {modality} in the table {name!r}",
            f"{factor:.4f}",
            "Below that the correction amplifies noise and offsets.",
        )
    return factor


__all__ = [
    "PHOTOMETRIES",
    "SMALLEST_DEGRADATION_FACTOR",
    "degradation_factor",
    "load_degradation",
    "photometric_factor",
    "physical_unit",
]
