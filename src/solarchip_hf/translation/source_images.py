"""What users give a translation pipeline, as scaled images of its sources with the facts of their headers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..models.header_cards import generator_of
from ..models.headers import SolarImage, SolarImageError
from ..models.image_inputs import is_array
from ..models.image_processing_solarchip import LONGEST_DIFFERENCE, SolarChipImageProcessor
from ..models.modalities import resolve_modality
from ..models.readers import read_image, require_modality
from .generated_maps import SourceRecord, record_source


@dataclass
class SourceImages:
    """The sources of B observations.

    Attributes:
        pixel_values: (B, S, size, size) float32, scaled, in the order of the pipeline's sources.
        facts: Canonical header facts of the first source of every observation.
        records: What the sources are, S an observation; empty unless asked for.
    """

    pixel_values: torch.Tensor
    facts: list[SolarImage]
    records: list[list[SourceRecord]] = field(default_factory=list)


def _split_batch(images: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A mapping of images as one observation, a mapping of arrays (N, H, W) as N of them."""
    batched = {name: image for name, image in images.items() if is_array(image) and image.ndim in (3, 4)}
    lengths = {len(image) for image in batched.values()}
    if not batched:
        return [dict(images)]
    if len(batched) < len(images) or len(lengths) > 1:
        raise ValueError(
            f"image: expected one batch of arrays (N, H, W) a source, with the same N, got "
            f"{ {name: tuple(getattr(image, 'shape', ())) for name, image in images.items()} }."
        )
    return [dict(zip(batched, rows, strict=True)) for rows in zip(*batched.values(), strict=True)]


def as_observations(image: Any, sources: Sequence[str]) -> list[tuple[dict[str, Any], bool]]:
    """The accepted forms of the argument `image` as observations.

    Args:
        image: One image, a mapping `{modality: image}`, a list of either, or an array: (H, W) or (N, H, W) of a single
            source, (N, S, H, W) of all.
        sources: Names of the S sources.

    Returns:
        For each observation its images by source, and whether the user named their channels.

    Raises:
        ValueError: The form does not fit the sources.
    """
    items: list[Any]
    if isinstance(image, Mapping):
        items = list(_split_batch(image))
    elif type(image) in (list, tuple):  # an astropy HDUList is a list too, but one image
        items = list(image)
    elif is_array(image) and image.ndim == 4 and image.shape[1] == len(sources):
        return [(dict(zip(sources, row, strict=True)), False) for row in image]
    elif is_array(image) and image.ndim == 3 and len(sources) == 1:
        items = list(image)
    else:
        items = [image]
    if not items:
        raise ValueError("image: expected at least one, got an empty list or batch.")
    return [_observation(item, sources) for item in items]


def _observation(item: Any, sources: Sequence[str]) -> tuple[dict[str, Any], bool]:
    if not isinstance(item, Mapping):
        if len(sources) > 1:
            got = f"an array {tuple(item.shape)}" if is_array(item) else type(item).__name__
            raise ValueError(
                f"image: expected a mapping with an image of each source ({', '.join(sources)}), got {got}."
            )
        return {sources[0]: item}, False
    images = {resolve_modality(name): value for name, value in item.items() if value is not None}
    if set(images) != set(sources) or len(images) < len(item):
        raise ValueError(
            f"image: expected one image of each source ({', '.join(sources)}), got images of "
            f"{', '.join(map(str, item)) or 'none'}{', some missing' if len(images) < len(item) else ''}."
        )
    return {name: images[name] for name in sources}, True


def _open(image: Any, source: str, named: bool, processor: SolarChipImageProcessor) -> Any:
    """Refuses what cannot be translated in the pipeline's own words; the rest as the processor takes it."""
    levels = hasattr(image, "getbands") or (is_array(image) and str(image.dtype).removeprefix("torch.") == "uint8")
    if levels:
        raise SolarImageError(
            f"<{type(image).__name__}>", "image", "physical values", "8-bit grey levels, which carry no unit",
            "Give the FITS file.",
        )  # fmt: skip
    if is_array(image):
        side = processor.size
        if tuple(image.shape) not in ((side, side), (1, side, side)):
            raise SolarImageError(
                "array", "shape", f"({side}, {side}) pixels on the canonical grid in physical units",
                f"{tuple(image.shape)}",
                "Give the file, a Map or an HDU, which is put on the grid by its WCS.",
            )  # fmt: skip
        return image
    opened = read_image(image, modality=source if named else None)
    if generator_of(opened.header):
        raise SolarImageError(
            opened.source, "CREATOR", "an observation", "an image that a pipeline generated",
            "Give the file that it was translated from.",
        )  # fmt: skip
    name = require_modality(opened)
    if name != source:
        raise SolarImageError(
            opened.source, "modality", f"an image of {source}, the source of this pipeline", name,
            "Load the pipeline of the other direction, or give the other file.",
        )  # fmt: skip
    return opened


def read_sources(
    image: Any, processor: SolarChipImageProcessor, sources: Sequence[str], *, identify: bool = False
) -> SourceImages:
    """Reads, checks and scales the sources of all observations.

    Args:
        image: As for `as_observations`; an image is a path or bytes of a file, an HDU, a Map, a `SolarImage`, or an
            array on the canonical grid in physical units.
        processor: The pipeline's image processor.
        sources: Names of the sources.
        identify: Whether to hash the sources and require a time, as generated Maps need.

    Returns:
        The scaled images.

    Raises:
        SolarImageError: An image cannot be translated: another channel, a part of the disk, a bad quality word, 8-bit
            grey levels, an array of another size, a generated image, no time where one is needed; or the sources of
            an observation were taken more than an hour apart.
        ValueError: The form of `image` does not fit the sources.
    """
    observations = as_observations(image, sources)
    size = processor.size
    pixel_values = np.empty((len(observations), len(sources), size, size), dtype=np.float32)
    facts: list[SolarImage] = []
    records: list[list[SourceRecord]] = []
    for row, (images, named) in enumerate(observations):
        times: list[SolarImage] = []
        records.append([])
        for column, source in enumerate(sources):
            opened = _open(images[source], source, named, processor)
            fact, physical = processor.to_physical(opened, source)
            pixel_values[row, column] = processor.scale(physical, source)
            times.append(fact)
            if identify:
                whole = opened if isinstance(opened, SolarImage) else fact
                records[-1].append(record_source(images[source], whole))
        _check_times(times)
        facts.append(times[0])
    return SourceImages(torch.from_numpy(pixel_values), facts, records if identify else [])


def _check_times(facts: Sequence[SolarImage]) -> None:
    moments = sorted((fact.time, fact.source) for fact in facts if fact.time is not None)
    if len(moments) > 1 and moments[-1][0] - moments[0][0] > LONGEST_DIFFERENCE:
        (first, _), (last, source) = moments[0], moments[-1]
        raise SolarImageError(
            source, "DATE-OBS", f"sources of one observation within {LONGEST_DIFFERENCE}",
            f"{first:%Y-%m-%d %H:%M} and {last:%Y-%m-%d %H:%M} UTC", "Give images of the same time.",
        )  # fmt: skip


__all__ = ["SourceImages", "as_observations", "read_sources"]
