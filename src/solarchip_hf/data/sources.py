"""Images inside containers: one name for an image of a Zarr store or a NetCDF file, where a path names a file.

A name is `CONTAINER::PLACE...`, as `sdomlv2.zarr::2015/131A::17` or `20150101_0000.nc::aia131::2015-01-01T00:00:00`. It
stands in a catalogue's `path`, so that pairing and preparation treat it as they treat a FITS file.
"""

import copy
import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from ..models.headers import SolarImage, SolarImageError
from ..models.modalities import MODALITIES
from ..models.readers import read_image
from .catalog import CATALOG_SCHEMA, catalog_frame, image_facts, unusable_facts

SEPARATOR = "::"
# What was divided out of the AIA images of a container before they were published.
CORRECTIONS: Mapping[str, str] = {
    "sdoml": "DN/s divided by SDOML's own degradation factor; the Sun rescaled to a radius of 976 arcsec at 512 px",
    "surya": "DN/s compensated for degradation by Surya's own table; the Sun at its fixed size of the core-sdo files",
}


class CardsAndPixels:
    """Cards and pixels in the form of a sunpy Map, which `read_image` takes.

    Args:
        cards: FITS cards by keyword.
        pixels: (H, W) array; only its shape counts where no more than the header is asked for.
    """

    def __init__(self, cards: Mapping[str, Any], pixels: Any):
        self.meta, self.data = cards, pixels


def container_kind(path: str) -> str | None:
    """`"sdoml"` or `"surya"` for the name of an image in such a container, None for the path of a file."""
    container, separator, _ = str(path).partition(SEPARATOR)
    if not separator:
        return None
    return "surya" if container.lower().endswith((".nc", ".nc4", ".h5")) else "sdoml"


def is_url(path: str) -> bool:
    """Whether the path names something that is not in this machine's file system."""
    return "://" in str(path).partition(SEPARATOR)[0]


def absolute(path: str) -> str:
    """The path made absolute; a URL as it is."""
    container, separator, place = str(path).partition(SEPARATOR)
    return str(path) if is_url(path) else os.path.abspath(container) + separator + place


def common_root(paths: Sequence[str]) -> str:
    """The deepest folder that holds every local file and container; empty where all are URLs."""
    folders = {os.path.dirname(absolute(path).partition(SEPARATOR)[0]) for path in paths if not is_url(path)}
    return os.path.commonpath(sorted(folders)) if folders else ""


def relative(path: str, root: str) -> str:
    """The path below a root; a URL as it is."""
    container, separator, place = str(path).partition(SEPARATOR)
    return str(path) if is_url(path) else os.path.relpath(container, root) + separator + place


def open_image(call: tuple[str, str]) -> SolarImage:
    """Reads a file, or an image in a container. Needs no processor, so that a small process of its own can do it.

    Args:
        call: A path, or the name of an image in a container; and its channel.
    """
    path, modality = call
    kind = container_kind(path)
    if kind is None:
        return read_image(path, modality=modality)
    return importlib.import_module(f".{kind}", __package__).read_contained(path)


def uncorrected_processor(processor: Any, path: str) -> Any:
    """The processor for an image of a source, without a correction that the source has applied itself.

    Args:
        processor: Its degradation is the name of that correction (`corrected_processor`).
        path: A path, or the name of an image in a container.
    """
    if container_kind(path) is None:
        return processor
    plain = copy.copy(processor)
    plain.degradation = None
    return plain


def corrected_processor(processor: Any, kinds: Mapping[str, set[str | None]]) -> Any:
    """The processor that says how the AIA images of containers are corrected for degradation.

    Their correction is part of what their values mean. It becomes the processor's `degradation`, a table that knows no
    AIA channel, so that statistics made of them are refused elsewhere, and FITS files that are not corrected so too.

    Args:
        processor: As the user gave it.
        kinds: For every modality the kinds of its sources (`container_kind`).

    Returns:
        The same processor, or one with the containers' correction.

    Raises:
        ValueError: AIA images of different kinds meet, or the processor names another correction.
    """
    met = {kind for name, found in kinds.items() if MODALITIES[name].instrument == "aia" for kind in found}
    if not met - {None}:
        return processor
    if len(met) > 1:
        raise ValueError(
            f"pairs: expected AIA images of one kind of source, got {sorted(str(kind or 'files') for kind in met)}: "
            "their corrections for degradation differ. Prepare them as datasets of their own."
        )
    (kind,) = met
    table = {"name": f"{kind}: corrected at the source", "factors": {"hmi": {"2010-05-01": 1.0, "2100-01-01": 1.0}}}
    if processor.degradation == table:
        return processor
    if processor.degradation is not None:
        raise ValueError(
            f"processor: expected degradation=None for images of {kind}, which are {CORRECTIONS[str(kind)]}, "
            f"got the table {processor.degradation['name']!r}. They would be corrected twice."
        )
    names = ("modalities", "size", "geometry", "photometry", "scaling", "off_disk")
    return type(processor)(**{name: getattr(processor, name) for name in names}, degradation=table)


def unit_notes(kinds: Mapping[str, set[str | None]]) -> dict[str, str]:
    """For every modality that comes from containers, how its values are to be understood.

    Args:
        kinds: For every modality the kinds of its sources (`container_kind`).
    """
    notes = {}
    for name, found in kinds.items():
        modules = [importlib.import_module(f".{kind}", __package__) for kind in sorted(found - {None})]  # type: ignore[type-var]
        if modules:
            notes[name] = " ".join(module.UNIT_NOTES[MODALITIES[name].instrument] for module in modules)
    return notes


def contained_facts(path: str, cards: Mapping[str, Any], pixels: Any, note: str) -> dict[str, Any]:
    """A row of the catalogue for an image in a container.

    Args:
        path: The image's name.
        cards: Its FITS cards.
        pixels: Something of its shape.
        note: How its values are to be understood.
    """
    try:
        image = read_image(CardsAndPixels(cards, pixels), header_only=True)
    except SolarImageError as error:
        return unusable_facts(path, str(error).partition(": ")[2])
    facts = image_facts(path, image)
    return {**facts, "notes": f"{note} {facts['notes']}".strip()}


def contained_catalog(rows: list[dict[str, Any]], found: int) -> pd.DataFrame:
    """The catalogue of a container's images, as `scan_archive` gives it.

    Args:
        rows: From `contained_facts` or `unusable_facts`.
        found: Number of images that were looked at.
    """
    table = catalog_frame(rows).sort_values("time", kind="stable", ignore_index=True)
    usable = int(table["usable"].sum())
    report = {"files": len(table), "read": found, "kept": 0, "gone": 0, "usable": usable}
    table.attrs["report"] = report | {"unusable": len(table) - usable}
    return table[CATALOG_SCHEMA.names]


def merge_catalogs(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Several catalogues as one, with the sum of their reports."""
    tables = list(tables)
    counts = [table.attrs["report"] for table in tables]
    merged = pd.concat(tables, ignore_index=True)
    merged.attrs["report"] = {name: sum(count[name] for count in counts) for name in counts[0]}
    return merged


def missing_package(package: str, what: str) -> ImportError:
    """The error of a reader whose package is not installed."""
    return ImportError(
        f"{what} needs the package {package}, which is not installed: pip install 'solarchip_hf[archives]'."
    )


__all__ = [
    "CORRECTIONS",
    "SEPARATOR",
    "CardsAndPixels",
    "absolute",
    "common_root",
    "contained_catalog",
    "contained_facts",
    "container_kind",
    "corrected_processor",
    "is_url",
    "merge_catalogs",
    "missing_package",
    "open_image",
    "relative",
    "uncorrected_processor",
    "unit_notes",
]
