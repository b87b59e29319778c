"""Generated images as sunpy Maps and FITS files that say what they are: made by which weights, from which files.

The WCS, the observer and the time are those of the source observation on the canonical grid, since a translation
changes what is seen and not from where or when. The instrument's cards name the channel that is imitated, so that sunpy
picks its colour map and tools their units; QUALITY says that there is no observation, so that no archive scan takes a
generated image for data.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from ..models.geometry import canonical_header
from ..models.header_cards import GENERATING_PROGRAM, number, text
from ..models.headers import SolarImage, SolarImageError
from ..models.modalities import MODALITIES
from ..models.photometry import physical_unit

# "Image not available" of AIA and "no data" of HMI: whoever filters by QUALITY will not take the image for data.
NO_OBSERVATION = 1 << 31


@dataclass(frozen=True)
class SourceRecord:
    """What a generated image was made from.

    Attributes:
        modality: Channel of the source.
        name: The file's name, or what object was given.
        sha256: Hexadecimal SHA-256 of `hashed`.
        hashed: `"file"` or `"pixels"` (float32, little-endian, row by row) where no file was given.
        begin: Start of the observation, UTC.
        end: End of the observation, UTC.
        creator: CREATOR of the source's header, which tells a synthetic source; empty where it has none.
        approximate: Whether the source is an 8-bit quick-look.
    """

    modality: str
    name: str
    sha256: str
    hashed: str
    begin: datetime
    end: datetime
    creator: str = ""
    approximate: bool = False


@dataclass(frozen=True)
class Generation:
    """How a generated image was made.

    Attributes:
        target: Channel that is imitated.
        model: Name of the pipeline's repository or folder.
        revision: Commit on the Hub; `"local"` of a folder.
        weights: Hexadecimal SHA-256 of all weights.
        preparation: The pipeline's `preparation`: photometry, degradation, geometry, size.
        scheduler: Class of the scheduler.
        steps: Denoising steps.
        guidance: Guidance scale.
    """

    target: str
    model: str
    revision: str
    weights: str
    preparation: Mapping[str, Any]
    scheduler: str
    steps: int
    guidance: float


def observation_span(facts: SolarImage) -> tuple[datetime, datetime]:
    """Start and end of an observation in UTC: half the exposure about its middle, for HMI half the cadence.

    Raises:
        SolarImageError: The image has no time.
    """
    if facts.time is None:
        raise SolarImageError(
            facts.source, "DATE-OBS", "an observation time, which a Map and a FITS file need", "none",
            "Give the image with its header, or take output_type='pt' or 'np'.",
        )  # fmt: skip
    seconds = facts.exposure or 0.0
    if facts.modality == "hmi":
        seconds = number(facts.header, "CADENCE") or MODALITIES["hmi"].cadence
    half = timedelta(seconds=seconds / 2)
    return facts.time - half, facts.time + half


def record_source(given: Any, opened: SolarImage) -> SourceRecord:
    """Identifies a source image.

    Args:
        given: What the user gave: a path, bytes, an HDU, a Map, ...
        opened: What `read_image` made of it, with its pixels.

    Returns:
        The record; files and bytes are hashed whole, other objects by their pixels.

    Raises:
        SolarImageError: The image has no time.
    """
    begin, end = observation_span(opened)
    if isinstance(given, str | os.PathLike):
        path = Path(given).expanduser()
        with open(path, "rb") as stream:
            name, hashed, digest = path.name, "file", hashlib.file_digest(stream, "sha256")
    elif isinstance(given, bytes | bytearray | memoryview):
        name, hashed, digest = f"{len(given)} bytes", "file", hashlib.sha256(given)
    else:
        name, hashed = type(given).__name__, "pixels"
        digest = hashlib.sha256(np.ascontiguousarray(opened.data, dtype="<f4").tobytes())
    return SourceRecord(
        modality=str(opened.modality),
        name=name,
        sha256=digest.hexdigest(),
        hashed=hashed,
        begin=begin,
        end=end,
        creator=text(opened.header, "CREATOR"),
        approximate=opened.approximate,
    )


def _stamp(time: datetime) -> str:
    return time.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="milliseconds")


def generated_cards(
    facts: SolarImage, sources: Sequence[SourceRecord], generation: Generation, kind: str
) -> dict[str, tuple[Any, str]]:
    """The cards of a generated image, each with its comment.

    Args:
        facts: Canonical facts of the first source, as `SolarChipImageProcessor.to_physical` gives them.
        sources: The sources.
        generation: How the image was made.
        kind: What it is: `"sample 1 of 8"`, `"mean of 8 samples"`, `"standard deviation of 8 samples"`.

    Returns:
        Card name to (value, comment).
    """
    preparation, target = generation.preparation, generation.target
    photometry = preparation["photometry"]
    exposure = MODALITIES[target].nominal_exposure if photometry == "nominal" else None
    # Without the source's own cards, whose INSTRUME is that of the source.
    header = canonical_header(replace(facts, header={}), target, physical_unit(target, photometry), exposure)
    cards: dict[str, tuple[Any, str]] = {name: (value, "") for name, value in header.items()}
    if kind.startswith("standard deviation"):
        cards["CONTENT"] = ("UNCERTAINTY", "spread of generated samples")
    cards |= {
        "QUALITY": (NO_OBSERVATION, "no observation: generated image"),
        "GENERATD": (True, "drawn by a model, not observed"),
        "GENKIND": (kind, "what the pixels are"),
        "CREATOR": (GENERATING_PROGRAM, "program"),
        "MODEL": (generation.model, "name of the weights"),
        "MODELREV": (generation.revision, "revision of the weights"),
        "WEIGHTS": (generation.weights, ""),  # 64 digits leave no room for a comment
        "SCHEDULR": (generation.scheduler, "noise scheduler"),
        "GENSTEPS": (generation.steps, "denoising steps"),
        "GUIDANCE": (generation.guidance, "classifier-free guidance scale"),
        "PHOTOMET": (photometry, "photometry of the pixels"),
        "DEGRADAT": (preparation["degradation"] or "none", "table of throughput divided by"),
        "GEOMETRY": (preparation["geometry"], "canonical grid"),
        "TIMESYS": ("UTC", "time scale of DATE-xxx"),
        "DATE-BEG": (_stamp(min(record.begin for record in sources)), "start of the source observation"),
        "DATE-AVG": (_stamp(facts.time), "middle of the source observation"),  # type: ignore[arg-type]
        "DATE-END": (_stamp(max(record.end for record in sources)), "end of the source observation"),
        "NSOURCES": (len(sources), "images translated"),
    }
    for index, record in enumerate(sources, start=1):
        cards |= {
            f"SRCMOD{index}": (record.modality, "channel of the source"),
            f"SRCFIL{index}": (record.name, ""),
            f"SRCSHA{index}": (record.sha256, ""),
            f"SRCHAS{index}": (record.hashed, "what was hashed, SHA-256"),
        }
        if record.creator:
            cards[f"SRCCRE{index}"] = (record.creator, "CREATOR of the source")
    return cards


def _history(sources: Sequence[SourceRecord], generation: Generation) -> str:
    lines = [  # of 72 characters at most, as cards hold them
        "Generated image: its pixels were drawn by a diffusion model and observed",
        "by no instrument. The cards of the instrument name what is imitated.",
    ]
    for record in sources:
        kind = "an approximate quick-look" if record.approximate else "an image"
        kind = "a SYNTHETIC image" if "SyntheticSun" in record.creator else kind
        lines.append(f"Translated to {generation.target} from {kind} of {record.modality}.")
    return "\n".join(lines)


def generated_map(
    pixels: np.ndarray,
    facts: SolarImage,
    sources: Sequence[SourceRecord],
    generation: Generation,
    kind: str,
) -> Any:
    """A generated image as a sunpy Map.

    Args:
        pixels: (size, size) float32 in the unit of the target's photometry, NaN where there is no prediction (beyond
            the limb of a magnetogram, beyond the inscribed circle of a passband).
        facts: Canonical facts of the first source.
        sources: The sources.
        generation: How the image was made.
        kind: As for `generated_cards`.

    Returns:
        An `AIAMap` or `HMIMap`.

    Raises:
        ImportError: sunpy is not installed.
        SolarImageError: The source has no time.
    """
    try:
        from sunpy.map import Map
    except ImportError as error:
        raise ImportError("Maps need sunpy: pip install 'solarchip_hf[sunpy]'.") from error
    cards = generated_cards(facts, sources, generation, kind)
    meta: dict[str, Any] = {name: value for name, (value, _) in cards.items()}
    meta["HISTORY"] = _history(sources, generation)
    meta["keycomments"] = {name: comment for name, (_, comment) in cards.items() if comment}
    return Map(np.asarray(pixels, dtype=np.float32), meta)


def generated_maps(
    prediction: np.ndarray,
    uncertainty: np.ndarray | None,
    samples: np.ndarray,
    facts: Sequence[SolarImage],
    sources: Sequence[Sequence[SourceRecord]],
    generation: Generation,
    reduce: str,
) -> tuple[list[Any], list[Any] | None, list[list[Any]]]:
    """Everything that was generated for B observations as Maps.

    Args:
        prediction: (B, size, size).
        uncertainty: (B, size, size), or None.
        samples: (B, n, size, size).
        facts: Canonical facts of the first source of each observation.
        sources: The sources of each observation.
        generation: How the images were made.
        reduce: `"mean"` or `"sample"`, what `prediction` is of the samples.

    Returns:
        Predictions, uncertainties (None without any) and lists of samples.
    """
    many = samples.shape[1]

    def to_map(pixels: np.ndarray, row: int, kind: str) -> Any:
        return generated_map(pixels, facts[row], sources[row], generation, kind)

    kind = f"mean of {many} samples" if reduce == "mean" and many > 1 else f"sample 1 of {many}"
    spread = f"standard deviation of {many} samples"
    rows = range(len(samples))
    return (
        [to_map(prediction[row], row, kind) for row in rows],
        None if uncertainty is None else [to_map(uncertainty[row], row, spread) for row in rows],
        [[to_map(samples[row, index], row, f"sample {index + 1} of {many}") for index in range(many)] for row in rows],
    )


def write_fits(image: Any, path: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Writes a Map as a FITS file with CHECKSUM and DATASUM, whole or not at all.

    Args:
        image: A sunpy Map, as `output_type="map"` gives it.
        path: Where to; its folder is made. A name that ends in `.gz` or `.bz2` gives a compressed file.
        overwrite: Whether a file that is there may be replaced.

    Returns:
        The path.

    Raises:
        FileExistsError: There is a file, and `overwrite` is false.
    """
    from astropy.io import fits

    path = Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: expected no such file, got one. Choose another name, or pass overwrite=True.")
    header = image.fits_header
    header["DATE"] = (_stamp(datetime.now(UTC)), "[UTC] when this file was written")
    unit = fits.PrimaryHDU(np.asarray(image.data, dtype=np.float32), header)
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = path.suffix if path.suffix in (".gz", ".bz2") else ""  # astropy compresses by the ending
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part{packed}")
    try:
        unit.writeto(temporary, checksum=True, overwrite=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


__all__ = [
    "NO_OBSERVATION",
    "Generation",
    "SourceRecord",
    "generated_cards",
    "generated_map",
    "generated_maps",
    "observation_span",
    "record_source",
    "write_fits",
]
