"""Helioviewer's JPEG2000 files: 8-bit pictures of SDO images with the FITS header in an XML box.

Their intensities are stretched for display. They are turned back to physical units by the stretches below, which makes
them approximate: clipped at both ends, 256 levels, and compressed with loss.
"""

import io
from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree import ElementTree

import numpy as np

from .header_cards import number
from .headers import SolarImageError

JPEG2000_SIGNATURE = b"\x00\x00\x00\x0cjP  \r\n\x87\n"

# Stretch and its range: DN/s for AIA, gauss for HMI. Helioviewer's own settings (jp2gen, hvs_default_*.pro), but for
# 171, fitted to DATAMEDN/EXPTIME of five files. Those of 171, 193, 304, 1700 agree with header medians; the other AIA
# ones could not be checked against a file. There is none for 4500.
_STRETCHES: Mapping[str, tuple[str, float, float]] = {
    "hmi": ("linear", -250.0, 250.0),
    "aia94": ("log", 0.1, 30.0),
    "aia131": ("log", 0.7, 500.0),
    "aia171": ("sqrt", 2.65, 1566.0),
    "aia193": ("log", 20.0, 2500.0),
    "aia211": ("log", 7.0, 1500.0),
    "aia304": ("log", 0.8, 250.0),
    "aia335": ("log", 0.4, 80.0),
    "aia1600": ("log", 20.0, 400.0),
    "aia1700": ("sqrt", 220.0, 5000.0),
}

QUICKLOOK_MODALITIES = frozenset(_STRETCHES)


def quicklook_table(modality: str) -> np.ndarray:
    """The physical value of each of the 256 grey levels of a Helioviewer picture.

    Args:
        modality: Name from `MODALITIES`.

    Returns:
        (256,) float32, in DN/s for AIA and gauss for HMI.

    Raises:
        ValueError: No stretch is known for the channel.
    """
    if modality not in _STRETCHES:
        raise ValueError(f"quick-look stretch: expected one of {', '.join(_STRETCHES)}, got {modality!r}.")
    kind, low, high = _STRETCHES[modality]
    share = np.arange(256) / 255.0
    if kind == "log":
        table = low * (high / low) ** share
    elif kind == "sqrt":
        table = (np.sqrt(low) + (np.sqrt(high) - np.sqrt(low)) * share) ** 2
    else:
        table = low + (high - low) * share
    return table.astype(np.float32)


def decode_quicklook(levels: np.ndarray, modality: str) -> np.ndarray:
    """Grey levels of a Helioviewer picture to approximate physical units.

    Args:
        levels: (H, W) uint8.
        modality: Name from `MODALITIES`.

    Returns:
        (H, W) float32 in DN/s for AIA, gauss for HMI.

    Raises:
        ValueError: No stretch is known for the channel.
    """
    return quicklook_table(modality)[levels]


def median_note(pixels: np.ndarray, header: Mapping[str, Any], modality: str) -> str:
    """Compares the median of decoded AIA pixels with DATAMEDN / EXPTIME; a sentence where they differ by over 30%.

    A median beyond the stretch's range is compared as clipped: that of 1700 lies off the disk, below the darkest level.
    """
    median, exposure = number(header, "DATAMEDN"), number(header, "EXPTIME")
    if median is None or not exposure or median <= 0.0:
        return ""
    _, low, high = _STRETCHES[modality]
    expected, decoded = min(max(median / exposure, low), high), float(np.median(pixels[::4, ::4]))
    # DATAMEDN is a whole number: half a unit either way is its own uncertainty
    if abs(decoded - expected) <= 0.3 * expected + 0.5 / exposure:
        return ""
    return (
        f"The decoded median of {decoded:.3g} DN/s is off the header's DATAMEDN/EXPTIME of {expected:.3g} DN/s by more "
        "than 30%: the stretch of this file differs from the known one."
    )


def read_jpeg2000(
    content: bytes, source: str, *, header_only: bool = False
) -> tuple[dict[str, Any], np.ndarray | None, tuple[int, int]]:
    """Reads a JPEG2000 file of Helioviewer.

    Args:
        content: The file's bytes.
        source: The path or a description, for messages.
        header_only: Leave the picture undecoded.

    Returns:
        The cards of the FITS header in its XML box; the grey levels (H, W) uint8 in FITS order, row 0 in the south
        (None for `header_only`); the shape (H, W).

    Raises:
        SolarImageError: The file is truncated or damaged, is no 8-bit grey picture, or has no FITS header.
    """
    boxes = dict(_boxes(content, source))
    if b"jp2c" not in boxes or not content.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise SolarImageError(
            source,
            "codestream",
            "a JPEG2000 codestream with its end mark",
            f"{len(content)} bytes without it",
            "The file is truncated: fetch it again.",
        )
    header = _xml_header(boxes.get(b"xml ", b""), source)
    image_header = boxes.get(b"jp2h", b"")[8:]  # its first box is ihdr: height, width, components, depth
    shape = (int.from_bytes(image_header[:4], "big"), int.from_bytes(image_header[4:8], "big"))
    if header_only:
        return header, None, shape
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("Reading JPEG2000 needs Pillow: pip install pillow") from error
    try:
        with Image.open(io.BytesIO(content)) as picture:
            mode = picture.mode
            levels = np.asarray(picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise SolarImageError(
            source, "codestream", "a JPEG2000 picture that decodes", str(error), "Fetch the file again."
        ) from error
    if mode != "L":
        raise SolarImageError(
            source, "picture mode", "8-bit grey", mode, "Only Helioviewer's grey pictures can be turned into data."
        )
    return header, levels[::-1], levels.shape  # pictures have the north on top, FITS in the last row


def _boxes(content: bytes, source: str) -> Iterator[tuple[bytes, bytes]]:
    """The file's top-level boxes: type and payload (ISO 15444-1, annex I.4)."""
    position = 0
    while position + 8 <= len(content):
        length, start = int.from_bytes(content[position : position + 4], "big"), position + 8
        kind = content[position + 4 : position + 8]
        if length == 1:
            length, start = int.from_bytes(content[start : start + 8], "big"), start + 8
        end = position + length if length else len(content)
        if end > len(content) or end < start:
            raise SolarImageError(
                source,
                f"box {kind!r}",
                f"{end - start} bytes",
                f"{len(content) - start} bytes",
                "The file is truncated: fetch it again.",
            )
        yield kind, content[start:end]
        position = end


def _xml_header(box: bytes, source: str) -> dict[str, Any]:
    expected, advice = "the FITS header of the image", "Only JPEG2000 files of Helioviewer carry one."
    try:
        root = ElementTree.fromstring(box.strip(b"\0 \r\n\t"))
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        got = f"XML that does not parse ({error})" if box else "no XML box"
        raise SolarImageError(source, "XML box", expected, got, advice) from error
    element = root if root.tag == "fits" else root.find("fits")
    if element is None:
        raise SolarImageError(source, "XML box", expected, f"a root element {root.tag!r} without it", advice)
    header: dict[str, Any] = {}
    for entry in element:
        header.setdefault(entry.tag.upper(), _typed((entry.text or "").strip()))
    return header


def _typed(written: str) -> int | float | str | None:
    for kind in (int, float):
        try:
            value = kind(written)
        except ValueError:
            continue
        return value if value == value and abs(value) != float("inf") else None
    return written


__all__ = [
    "JPEG2000_SIGNATURE",
    "QUICKLOOK_MODALITIES",
    "decode_quicklook",
    "median_note",
    "quicklook_table",
    "read_jpeg2000",
]
