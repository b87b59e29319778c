"""Typed facts of one solar image, and the error that names what cannot be handled."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np


class SolarImageError(ValueError):
    """An image that cannot be handled, said in one sentence: file, card, expected, got, what to do.

    Args:
        source: The file's path, or a description of the object that was given.
        fieldname: The header card or property at fault, as `"CONTENT"`.
        expected: What must hold.
        got: What was found.
        advice: What the user can do about it.
    """

    def __init__(self, source: str, fieldname: str, expected: str, got: str, advice: str = ""):
        self.source, self.fieldname, self.expected, self.got, self.advice = source, fieldname, expected, got, advice
        super().__init__(f"{source}: {fieldname}: expected {expected}, got {got}.{' ' + advice if advice else ''}")

    def __reduce__(self):  # exceptions with several arguments do not cross a process border by themselves
        return type(self), (self.source, self.fieldname, self.expected, self.got, self.advice)


@dataclass(frozen=True, eq=False)
class SolarImage:
    """A solar image in its native pixels together with the header facts that later steps rely on.

    Attributes:
        data: (H, W) float32 in `unit`, NaN where missing; row 0 is the first FITS row, nothing rotated or flipped. If
            only the header was read: a read-only view of NaN that takes no memory.
        modality: Name from `MODALITIES`, or None where the image is none of them.
        source: The path, or a description, for messages.
        instrument: As the header names it, upper case: `"AIA"`, `"HMI"`, `"MDI"`, ...
        time: Mid-observation time, UTC, time-zone aware. Given without a zone it is taken as UTC, given in another zone
            it is converted; `time_nominal` likewise.
        time_nominal: The slot of the series: T_REC for HMI (its calendar date is the TAI one, marked UTC), DATE-OBS
            rounded to the cadence for AIA; the observation time where there is no known series.
        exposure: Exposure time in seconds; None where it has no meaning (HMI).
        quality: The QUALITY word; None where absent.
        near_real_time: Whether the file is a near-real-time product.
        unit: `"G"`, `"DN"` or `"DN/s"`; of an image that is none of the channels, as its header writes it, else empty.
        crpix: FITS reference pixel (x, y), the centre of the first pixel being 1.
        crval: Helioprojective coordinates (Tx, Ty) of the reference pixel in arcsec.
        cdelt: Plate scale (x, y) in arcsec per pixel.
        rotation: 2 x 2 matrix (rows) from pixel offsets to helioprojective axes, unit scale, from PCi_j or CROTA2.
        rsun_arcsec: Apparent photospheric radius in arcsec.
        observer_distance: Distance to the Sun in metres; None where unknown.
        b0: Heliographic latitude of the observer in degrees; None where unknown.
        l0: Carrington longitude of the observer in degrees; None where unknown.
        full_disk: Whether the whole solar disk lies within the frame.
        approximate: True for an 8-bit quick-look whose intensities are only approximately physical.
        usable: False where the image should not enter a full-disk data set: the quality word advises against it, it is
            none of the channels, shows a part of the disk, is blank or dark, or has no time.
        reason: Why not usable; empty otherwise.
        notes: Warnings of the reader, each a sentence.
        header: The header's cards as plain Python values.
    """

    data: np.ndarray
    modality: str | None
    source: str
    instrument: str
    time: datetime | None
    time_nominal: datetime | None
    exposure: float | None
    quality: int | None
    near_real_time: bool
    unit: str
    crpix: tuple[float, float]
    crval: tuple[float, float]
    cdelt: tuple[float, float]
    rotation: tuple[tuple[float, float], tuple[float, float]]
    rsun_arcsec: float
    observer_distance: float | None = None
    b0: float | None = None
    l0: float | None = None
    full_disk: bool = True
    approximate: bool = False
    usable: bool = True
    reason: str = ""
    notes: tuple[str, ...] = ()
    header: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("time", "time_nominal"):
            value = getattr(self, name)
            if value is not None and value.tzinfo is not UTC:
                value = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
                object.__setattr__(self, name, value)  # the record is frozen for everybody else

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.data.shape


__all__ = ["SolarImage", "SolarImageError"]
