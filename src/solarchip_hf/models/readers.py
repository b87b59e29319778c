"""One solar image from any of its forms: FITS, Helioviewer's JPEG2000, astropy HDU, sunpy Map."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from .fits_files import image_shape, physical_pixels, plain_header, read_fits
from .header_cards import (
    calendar_time,
    generator_of,
    instrument_of,
    is_helioprojective,
    number,
    plain_cards,
    text,
    try_time,
)
from .headers import SolarImage, SolarImageError
from .jpeg2000 import JPEG2000_SIGNATURE, QUICKLOOK_MODALITIES, decode_quicklook, median_note, read_jpeg2000
from .modalities import MODALITIES, detect_modality, resolve_modality, wavelength_of
from .pointing import ASTRONOMICAL_UNIT, Pointing, read_pointing
from .quality import AIA_NEAR_REAL_TIME_BIT, decode_quality, parse_quality

_GAUSS = frozenset({"g", "gauss", "mx/cm^2", "mx/cm2", "mxcm-2", "mx/cm**2"})
_COUNTS = frozenset({"dn", "ct", "count", "counts", "adu"})
# Seconds between level-1 frames; 12 of the channels that are not named (Lemen et al. 2012, Solar Physics 275, 17).
_LEVEL_1_CADENCES = {"aia1600": 24.0, "aia1700": 24.0, "aia4500": 3600.0}
_UNITS_OF = {"hmi": ("G",), "aia": ("DN", "DN/s")}


@dataclass
class _Contents:
    """What a source gave before it is interpreted; `pixels` is None where only the header was asked for."""

    header: dict[str, Any]
    pixels: np.ndarray | None
    shape: tuple[int, int]
    source: str
    notes: list[str]
    quicklook: bool = False
    bare: bool = False  # a picture that never had a header


@dataclass(frozen=True)
class _Refusal:
    """Why an image is no channel of the table; `told` marks what an explicit `modality=` overrules."""

    fieldname: str
    expected: str
    got: str
    advice: str
    told: bool = False

    def error(self, source: str) -> SolarImageError:
        return SolarImageError(source, self.fieldname, self.expected, self.got, self.advice)

    def __str__(self) -> str:
        return f"{self.fieldname}: expected {self.expected}, got {self.got}"


def read_image(
    source: Any, *, modality: str | int | None = None, quicklook: bool = False, header_only: bool = False
) -> SolarImage:
    """Reads one solar image and the facts of its header.

    Args:
        source: A path or the bytes of a FITS file (plain, `.gz`, tile-compressed) or of a JPEG2000 file of
            Helioviewer; an astropy HDU or `HDUList`; a sunpy Map; a `SolarImage`; with `quicklook`, an 8-bit grey PIL
            picture.
        modality: The channel that must come, in any spelling. It also tells to read an image of another instrument (an
            MDI magnetogram) as that channel; it never makes a continuum image or a SHARP patch into one.
        quicklook: Accept a grey PIL picture, which has no header: the Sun is taken as centred, north up, on
            Helioviewer's plate scale, and everything about it is approximate.
        header_only: Read the header's facts without decoding pixels, for scans: `data` is then a read-only (H, W)
            view of NaN that takes no memory. File sizes are checked all the same.

    Returns:
        The image in its native orientation. What is none of the channels comes with `modality=None`, and what should
        not be used (bad quality, partial disk, no channel) with `usable=False` and the reason, so that a scan can
        describe every file; `require_modality` turns these into errors.

    Raises:
        SolarImageError: The source cannot be read (no FITS, truncated, damaged, a cube, no WCS), or `modality` was
            given and the image is not that.
        FileNotFoundError: No such file.
        ValueError: `modality` names no channel.
    """
    wanted = None if modality is None else resolve_modality(modality)
    if isinstance(source, SolarImage):
        if wanted is None:
            return source
        return replace(source, modality=require_modality(source, wanted, full_disk=False))
    return _interpret(_contents(source, wanted, quicklook, header_only), wanted)


def require_modality(image: SolarImage, modality: str | int | None = None, *, full_disk: bool = True) -> str:
    """The channel of an image that is to be processed, or an error that says why it is none.

    Args:
        image: From `read_image`.
        modality: The channel it must be, in any spelling; it also tells to take another instrument's image for it.
        full_disk: Whether the whole disk must lie in the frame.

    Returns:
        One of `MODALITY_NAMES`.

    Raises:
        SolarImageError: The image is no channel (a continuum image, a SHARP patch, another instrument), another one
            than asked for, in another unit, or shows a part of the disk.
    """
    wanted = None if modality is None else resolve_modality(modality)
    if image.modality is None or (wanted is not None and wanted != image.modality):
        name = _checked_modality(image.header, image.unit, image.source, wanted)
        if name is None:
            raise _refusal(image.header, image.unit).error(image.source)  # type: ignore[union-attr]
    else:
        name = image.modality
    if full_disk and not image.full_disk:
        raise SolarImageError(
            image.source,
            "full disk",
            f'the whole solar disk (radius {image.rsun_arcsec:.0f}") in the frame',
            f"{image.shape[1]} x {image.shape[0]} pixels with the disk cut off (CRPIX, CDELT, RSUN_OBS)",
            "A cut-out cannot be put on the full-disk grid.",
        )
    return name


def _contents(source: Any, wanted: str | None, quicklook: bool, header_only: bool) -> _Contents:
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        if "://" in str(source):
            raise SolarImageError(str(source), "path", "a local file", "a URL", "Download it first.")
        if path.is_dir():
            raise SolarImageError(str(source), "path", "a file", "a folder", "Give one file, or scan the folder.")
        with open(path, "rb") as stream:
            head = stream.read(len(JPEG2000_SIGNATURE))
        return _from_file(path.read_bytes() if head == JPEG2000_SIGNATURE else path, str(source), header_only)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_file(bytes(source), f"<{len(source)} bytes>", header_only)
    if hasattr(source, "meta") and hasattr(source, "data"):
        return _from_map(source, header_only)
    if hasattr(source, "header") and hasattr(source, "data"):
        return _from_units([source], header_only)
    if isinstance(source, list | tuple) and source and all(hasattr(unit, "header") for unit in source):
        return _from_units(list(source), header_only)
    if hasattr(source, "getbands") and hasattr(source, "convert"):
        return _from_picture(source, wanted, quicklook, header_only)
    raise SolarImageError(
        f"<{type(source).__name__}>",
        "image",
        "a path, bytes, an astropy HDU or HDUList, or a sunpy Map",
        type(source).__name__,
        "Arrays go to the image processor with modality=.",
    )


def _from_file(content: Path | bytes, source: str, header_only: bool) -> _Contents:
    if isinstance(content, bytes) and content.startswith(JPEG2000_SIGNATURE):
        header, levels, shape = read_jpeg2000(content, source, header_only=header_only)
        return _Contents(header, levels, shape, source, [], quicklook=True)
    header, pixels, shape, notes = read_fits(content, source, header_only=header_only)
    return _Contents(header, pixels, shape, source, notes)


def _from_units(units: list[Any], header_only: bool) -> _Contents:
    """The first of astropy's HDUs that holds an image."""
    for index, unit in enumerate(units):
        axes = tuple(int(length) for length in reversed(getattr(unit, "shape", None) or ()))
        if not axes or not hasattr(unit, "section"):  # tables have no section
            continue
        source = f"<{type(unit).__name__} {index}>"
        shape = image_shape(axes, source)
        pixels = None if header_only else np.asarray(unit.data)
        header, notes = plain_header(unit.header)  # after the data: astropy drops BSCALE once it has applied it
        if pixels is not None:
            pixels = physical_pixels(pixels, header if pixels.dtype.kind == "i" else {})
        return _Contents(header, pixels, shape, source, notes)
    raise SolarImageError("<HDUList>", "NAXIS", "a two-dimensional image in one of the HDUs", "none")


def _from_map(source: Any, header_only: bool) -> _Contents:
    name = f"<{type(source).__name__}>"
    shape = image_shape(tuple(source.data.shape[::-1]), name)
    pixels = None
    if not header_only:
        pixels = physical_pixels(np.asarray(source.data), {})
        mask = getattr(source, "mask", None)
        if mask is not None:
            pixels[np.asarray(mask)] = np.nan
    return _Contents(plain_cards(source.meta), pixels, shape, name, [])


def _is_grey(picture: Any) -> bool:
    red, *others = (np.asarray(band) for band in picture.split())
    return all(np.array_equal(red, band) for band in others)


def _from_picture(picture: Any, wanted: str | None, quicklook: bool, header_only: bool) -> _Contents:
    name = "<PIL picture>"
    if not quicklook or wanted is None:
        got = "a picture without a header"
        advice = "Pass modality= and quicklook=True to read it approximately, or give the FITS or JPEG2000 file itself."
        raise SolarImageError(name, "image", "a file with a header", got, advice)
    if picture.mode == "RGB" and _is_grey(picture):  # as many tools open grey pictures
        picture = picture.getchannel(0)
    if picture.mode != "L":
        raise SolarImageError(name, "picture mode", "8-bit grey ('L')", repr(picture.mode), "Colour is not intensity.")
    width, height = picture.size
    scale = 2457.6 / max(width, height)  # Helioviewer's SDO frames: 4096 pixels of 0.6 arcsec
    header = {"CRPIX1": (width + 1) / 2, "CRPIX2": (height + 1) / 2, "CRVAL1": 0.0, "CRVAL2": 0.0}
    header |= {"CDELT1": scale, "CDELT2": scale, "CROTA2": 0.0, "CTYPE1": "HPLN-TAN", "CTYPE2": "HPLT-TAN"}
    header |= {"TELESCOP": "SDO", "INSTRUME": MODALITIES[wanted].instrument.upper(), "DSUN_OBS": ASTRONOMICAL_UNIT}
    header |= {"CONTENT": "MAGNETOGRAM"} if wanted == "hmi" else {"WAVELNTH": MODALITIES[wanted].wavelength}
    pixels = None if header_only else np.asarray(picture)[::-1]
    notes = ["A picture without a header: centre, north, scale, distance and intensities are assumed."]
    return _Contents(header, pixels, (height, width), name, notes, quicklook=True, bare=True)


def _interpret(contents: _Contents, wanted: str | None) -> SolarImage:
    """Header cards to typed facts."""
    header, source, notes = contents.header, contents.source, list(contents.notes)
    instrument = instrument_of(header)
    time = _observation_time(header, instrument, notes)
    pointing = read_pointing(header, source, time)
    unit = _unit(header, instrument, contents.quicklook)
    name = _checked_modality(header, unit, source, wanted)
    if contents.quicklook and name is None:
        unit = ""
        notes.append("An 8-bit picture without a known stretch: the pixels are grey levels.")
    elif contents.quicklook and (name not in QUICKLOOK_MODALITIES or detect_modality(header) != name):
        expected = f"SDO's {', '.join(sorted(QUICKLOOK_MODALITIES))}, whose stretch is known"
        raise SolarImageError(source, "picture", expected, f"{instrument} as {name}", "Use the FITS file.")
    if name is not None and detect_modality(header) is None:
        notes.append(f"Read as {name} because modality= says so ({_refusal(header, unit)}).")
        if not unit and not instrument:  # as sunpy's reproject_to leaves it
            unit = MODALITIES[name].unit
            notes.append(f"BUNIT is missing too: taken as {unit}, the archive's unit of {name}.")
    exposure = None if instrument in ("HMI", "MDI") else number(header, "EXPTIME")
    quality = parse_quality(header.get("QUALITY"))
    rejections, warnings = decode_quality(instrument, quality)
    notes += [*pointing.notes, *warnings]
    full_disk = pointing.full_disk(contents.shape)

    reasons = list(rejections)
    if generator := generator_of(header):
        reasons.insert(0, f"generated image (MODEL: {generator}), which no instrument observed")
    if name is None:
        reasons.append(str(_refusal(header, unit)))
    elif not full_disk:
        reasons.append("partial disk: the frame does not hold the whole Sun")
    if time is None and not contents.bare:
        reasons.append("no observation time (T_OBS, DATE-OBS)")
    if exposure is not None and exposure <= 0.0:
        reasons.append(f"EXPTIME: expected more than 0 s, got {exposure:g}")
        exposure = None
    if text(header, "IMG_TYPE").upper() == "DARK":
        reasons.append("dark image (IMG_TYPE)")

    data = _pixels(contents, name, pointing, notes)
    if contents.pixels is not None and (blank := _blank(data)):
        reasons.append(blank)
    return SolarImage(
        data=data,
        modality=name,
        source=source,
        instrument=instrument,
        time=time,
        time_nominal=_nominal_time(header, name, time),
        exposure=exposure,
        quality=quality,
        near_real_time=_near_real_time(header, instrument, quality),
        unit=unit,
        crpix=pointing.crpix,
        crval=pointing.crval,
        cdelt=pointing.cdelt,
        rotation=pointing.rotation,
        rsun_arcsec=pointing.rsun_arcsec,
        observer_distance=pointing.observer_distance,
        b0=pointing.b0,
        l0=pointing.l0,
        full_disk=full_disk,
        approximate=contents.quicklook,
        usable=not reasons,
        reason="; ".join(reasons),
        notes=tuple(notes),
        header=header,
    )


def _pixels(contents: _Contents, name: str | None, pointing: Pointing, notes: list[str]) -> np.ndarray:
    """The image's array: physical units, NaN where missing; a NaN view where only the header was asked for."""
    if contents.pixels is None:
        return np.broadcast_to(np.float32(np.nan), contents.shape)
    if not contents.quicklook:
        return contents.pixels
    if name is None:
        return contents.pixels.astype(np.float32)
    pixels = decode_quicklook(contents.pixels, name)
    if name == "hmi":  # a magnetogram ends at the limb; the picture fills the rest with grey
        (x, y), (half_width, half_height) = pointing.disk_extent()
        across = ((np.arange(1, pixels.shape[1] + 1) - x) / half_width).astype(np.float32) ** 2
        along = ((np.arange(1, pixels.shape[0] + 1) - y) / half_height).astype(np.float32) ** 2
        pixels[along[:, None] > 1.0 - across[None, :]] = np.nan
    elif note := median_note(pixels, contents.header, name):
        notes.append(note)
    return pixels


def _blank(data: np.ndarray) -> str:
    """Says so where no pixel holds anything; looks at a coarse grid first."""
    for view in (data[::8, ::8], data):
        finite = view[np.isfinite(view)]
        if finite.size and finite.min() != finite.max():
            return ""
    return "blank image: no finite pixel" if not finite.size else f"blank image: every pixel is {finite[0]:g}"


def _observation_time(header: Mapping[str, Any], instrument: str, notes: list[str]) -> datetime | None:
    """Mid-observation time in UTC: T_OBS, which is TAI for HMI and MDI, else the start and half the exposure."""
    tai = instrument in ("HMI", "MDI")
    start = try_time(header, "DATE-OBS", "DATE_OBS")
    time = try_time(header, "T_OBS", default_scale="TAI" if tai else "UTC")
    if time is None and start is not None:
        # HMI's DATE-OBS precedes T_OBS by half its integration: 22.5 s at 45 s cadence, 67.5 s for the 720 s series
        half = (
            min((number(header, "CADENCE") or 135.0) / 2.0, 67.5) if tai else (number(header, "EXPTIME") or 0.0) / 2.0
        )
        time = start + timedelta(seconds=half)
        notes.append(f"T_OBS is missing: time taken as DATE-OBS plus {half:g} s.")
    if time is not None and start is not None and abs((time - start).total_seconds()) > 900.0:
        notes.append(
            f"T_OBS ({time:%Y-%m-%dT%H:%M:%S}) and DATE-OBS ({start:%Y-%m-%dT%H:%M:%S}) disagree: T_OBS counts."
        )
    return time


def _nominal_time(header: Mapping[str, Any], name: str | None, time: datetime | None) -> datetime | None:
    """The slot of the series. A TAI slot keeps its calendar date, marked UTC: 00:00 TAI belongs to the new day."""
    slot = _tai_calendar(text(header, "T_REC"))
    if slot is not None or name is None or time is None:
        return slot or time
    if name == "hmi":
        return _rounded(_tai_calendar(text(header, "T_OBS")) or time, MODALITIES[name].cadence)
    cadence = MODALITIES[name].cadence
    if number(header, "LVL_NUM") == 1.0:  # every frame of the camera, not one in two minutes
        cadence = _LEVEL_1_CADENCES.get(name, 12.0)
    return _rounded(try_time(header, "DATE-OBS", "DATE_OBS") or time, cadence)


def _tai_calendar(stamp: str) -> datetime | None:
    """A TAI stamp as written, marked UTC; None of any other stamp, JSOC's mark of a missing time included."""
    try:
        moment, scale = calendar_time(stamp)
    except ValueError:
        return None
    return moment.replace(tzinfo=UTC) if scale == "TAI" else None


def _rounded(time: datetime, cadence: float) -> datetime:
    midnight = time.replace(hour=0, minute=0, second=0, microsecond=0)
    return midnight + timedelta(seconds=cadence * math.floor((time - midnight).total_seconds() / cadence + 0.5))


def _near_real_time(header: Mapping[str, Any], instrument: str, quality: int | None) -> bool:
    if instrument == "AIA" and quality is not None and quality >> AIA_NEAR_REAL_TIME_BIT & 1:
        return True
    return number(header, "QLOOK") == 1 or "_nrt" in text(header, "DRMS_ID").lower()


def _unit(header: Mapping[str, Any], instrument: str, quicklook: bool) -> str:
    if quicklook:
        return {"AIA": "DN/s", "HMI": "G"}.get(instrument, "")
    written = text(header, "BUNIT", "PIXLUNIT")
    # DN are those of one pixel, whether written so or not
    bare = re.sub(r"/pix(els?)?(?=/|$)", "", written.lower().replace(" ", "")).replace("/(pixs)", "/s")
    if bare in _GAUSS:
        return "G"
    if not bare:
        return {"AIA": "DN", "HMI": "G", "MDI": "G"}.get(instrument, "")
    # sunpy gives a Map without BUNIT the unit "1 / s" when it is divided by its exposure time
    counts = _COUNTS | {"", "1"} if instrument == "AIA" else _COUNTS
    for per_second in ("/s", "/sec", "s-1", "s**-1", "s^-1", "/second"):
        if bare.removesuffix(per_second) in counts and bare.endswith(per_second):
            return "DN/s"
    return "DN" if bare in _COUNTS else written


def _checked_modality(header: Mapping[str, Any], unit: str, source: str, wanted: str | None) -> str | None:
    """The image's channel; None where it is none and nothing was asked for.

    Raises:
        SolarImageError: `wanted` is given and the image is not that, nor one that may be taken for it.
    """
    detected = detect_modality(header)
    refusal = _refusal(header, unit)
    if wanted is None:
        return detected if refusal is None else None
    if detected is not None and detected != wanted:
        card = "CONTENT" if detected == "hmi" else "WAVELNTH"
        raise SolarImageError(
            source, card, f"an image of {wanted}", f"{detected}", "Give the right modality=, or none."
        )
    if refusal is None:
        return wanted
    if refusal.told and detected is None:
        content, wavelength = text(header, "CONTENT").upper(), wavelength_of(header)
        if wanted == "hmi":
            fits = "MAGNETOGRAM" in content or not content
        else:
            fits = wavelength is None or abs(wavelength - MODALITIES[wanted].wavelength) <= 5.0
        if fits and unit in (*_UNITS_OF[MODALITIES[wanted].instrument], ""):
            return wanted
    raise refusal.error(source)


def _refusal(header: Mapping[str, Any], unit: str) -> _Refusal | None:
    """Why the header describes no channel of the table; None where it does."""
    instrument, content = instrument_of(header), text(header, "CONTENT")
    if not is_helioprojective(header):
        advice = "Map projections (SHARP CEA patches, synoptic charts) are no full-disk images: fetch hmi.M_720s."
        return _Refusal("CTYPE1", "helioprojective axes (HPLN-TAN)", repr(text(header, "CTYPE1")), advice)
    if instrument == "HMI" and number(header, "HARPNUM") is not None:
        got = f"the SHARP patch of HARP {number(header, 'HARPNUM'):.0f}"
        return _Refusal("HARPNUM", "a full-disk image", got, "Fetch hmi.M_720s instead.")
    if instrument == "HMI" and detect_modality(header) is None:
        if not content:
            advice = "Pass modality='hmi' if it is a line-of-sight magnetogram."
            return _Refusal("CONTENT", "'MAGNETOGRAM'", "no such card", advice, told=True)
        advice = "It is not a magnetogram: fetch hmi.M_720s or hmi.M_45s."
        return _Refusal("CONTENT", "'MAGNETOGRAM'", repr(content), advice)
    if instrument == "AIA" and detect_modality(header) is None:
        known = ", ".join(str(m.wavelength) for m in MODALITIES.values() if m.instrument == "aia")
        wavelength = text(header, "WAVELNTH")
        got = repr(wavelength) if wavelength else "no such card"
        return _Refusal("WAVELNTH", f"one of {known} angstrom", got, "Pass modality= if you know it.", not wavelength)
    if instrument == "MDI" and "MAGNETOGRAM" not in content.upper():
        return _Refusal("CONTENT", "a magnetogram", repr(content), "It is not a magnetogram, and MDI is not on SDO.")
    if instrument not in ("AIA", "HMI"):
        advice = f"{instrument} is another instrument"
        if instrument == "MDI":
            advice += ": its field runs about 1.4 times HMI's; pass modality='hmi' to read it all the same."
        elif instrument:
            advice += ": pass modality= to read it as one of them all the same."
        else:
            advice = "Pass modality= if you know the channel, as of a Map that sunpy has reprojected."
        got = instrument or "no INSTRUME or TELESCOP card"
        return _Refusal("INSTRUME", "AIA or HMI of SDO", got, advice, told=True)
    expected = _UNITS_OF[instrument.lower()]
    if unit not in expected:
        advice = "Convert the image, and its BUNIT, first."
        return _Refusal("BUNIT", " or ".join(expected), repr(unit), advice)
    return None


__all__ = ["read_image", "require_modality"]
