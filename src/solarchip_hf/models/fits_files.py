"""FITS files to header cards and pixels: plain, gzipped or tile-compressed, checked before they are decoded.

The blocks of a file are walked here, so that a web page, a truncated download, a damaged heap or a cube is told with
exact figures and before any decoder sees it; tile-compressed images are decoded by astropy.
"""

import gzip
import io
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np

from .header_cards import is_storage_card, number, plain_value, text
from .headers import SolarImageError

_BLOCK = 2880
_MAX_HEADER_BLOCKS = 2000
_TYPES = {8: ">u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}
_NOT_NUMBERS = frozenset((b"nan", b"-nan", b"+nan", b"inf", b"-inf", b"+inf"))
# FITS headers are printable ASCII; control characters become blanks, anything else a question mark
_PRINTABLE = bytes(byte if 32 <= byte <= 126 else 32 if byte < 32 else 63 for byte in range(256))
_KNOWN_CONTENTS = (
    (b"\x00\x00\x00\x0cjP  ", "a JPEG2000 file", "Give it the ending .jp2."),
    (b"PK\x03\x04", "a zip or .npz archive", "Load the array with numpy and pass it with modality=."),
    (b"\x93NUMPY", "a NumPy array", "Load the array with numpy and pass it with modality=."),
    (b"\x89HDF", "an HDF5 or NetCDF file", "Read the variable yourself and pass the array with modality=."),
    (b"CDF", "a NetCDF file", "Read the variable yourself and pass the array with modality=."),
    (b"\x89PNG", "a PNG picture", "Pictures are not data; use FITS or Helioviewer's JPEG2000."),
    (b"\xff\xd8\xff", "a JPEG picture", "Pictures are not data; use FITS or Helioviewer's JPEG2000."),
)

_MOST_INFLATED = 2**30  # bytes; no SDO image is larger, and a small file in gzip could fill the memory


@dataclass(frozen=True)
class FitsUnit:
    """One header-data unit of a file: all its cards, and where its data lies (bytes from the file's start)."""

    index: int
    cards: Mapping[str, Any]
    notes: tuple[str, ...]
    data_start: int

    @property
    def compressed(self) -> bool:
        """Whether it is a table that holds a tile-compressed image."""
        return self.cards.get("ZIMAGE") is True

    @property
    def axes(self) -> tuple[int, ...]:
        """Lengths of the image's axes, NAXIS1 first; empty where the unit holds no image."""
        if not self.compressed and text(self.cards, "XTENSION") not in ("", "IMAGE"):
            return ()
        return _axes(self.cards, "Z" if self.compressed else "")

    @property
    def data_bytes(self) -> int:
        """Bytes of the data without padding (FITS standard 4.0, equation 2)."""
        axes = _axes(self.cards, "")
        if not axes:
            return 0
        groups, parameters = number(self.cards, "GCOUNT"), number(self.cards, "PCOUNT")
        elements = int(1 if groups is None else groups) * (int(parameters or 0) + math.prod(axes))
        return max(0, abs(int(number(self.cards, "BITPIX") or 0)) // 8 * elements)


def astropy_fits() -> ModuleType:
    """The module `astropy.io.fits`, imported at the first use only: the models themselves do without it."""
    try:
        from astropy.io import fits
    except ImportError as error:
        raise ImportError("Reading FITS needs astropy: pip install astropy") from error
    return fits


def plain_header(header: Any) -> tuple[dict[str, Any], list[str]]:
    """The cards of an astropy `Header` that describe the image, as plain values.

    Returns:
        Card name (upper case) to value, ready for JSON; and notes, of which one names the cards that do not parse.
    """
    cards, notes = _all_cards(header)
    return {name: value for name, value in cards.items() if not is_storage_card(name)}, notes


def read_fits(
    content: Path | bytes, source: str, *, header_only: bool = False
) -> tuple[dict[str, Any], np.ndarray | None, tuple[int, int], list[str]]:
    """Reads the first image of a FITS file.

    Args:
        content: A path, or the bytes of a file; plain or gzipped.
        source: The path or a description, for messages.
        header_only: Leave the pixels undecoded; the size of an ungzipped file is checked all the same.

    Returns:
        The header's cards, the pixels as (H, W) float32 in physical units with NaN where missing (None for
        `header_only`), the shape (H, W), and notes.

    Raises:
        SolarImageError: The file is not FITS, is damaged or truncated, or holds no two-dimensional image.
    """
    notes: list[str] = []
    with open(content, "rb") if isinstance(content, Path) else io.BytesIO(content) as stream:
        head = stream.read(2)
        stream.seek(0)
        if head != b"\x1f\x8b":
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            return _read_stream(stream, content, size, source, header_only, notes)
        try:
            if header_only:
                with gzip.open(stream) as inflated:
                    return _read_stream(inflated, b"", None, source, True, notes)
            with gzip.open(stream) as inflated:
                inflated_bytes = inflated.read(_MOST_INFLATED + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise SolarImageError(source, "file", "a whole gzip file", str(error), "Fetch the file again.") from error
    if len(inflated_bytes) > _MOST_INFLATED:
        raise SolarImageError(
            source, "file", f"at most {_MOST_INFLATED} bytes in gzip", "more", "No image of the Sun is that large."
        )
    return _read_stream(io.BytesIO(inflated_bytes), inflated_bytes, len(inflated_bytes), source, False, notes)


def _read_stream(
    stream: IO[bytes] | gzip.GzipFile,
    content: Path | bytes,
    size: int | None,
    source: str,
    header_only: bool,
    notes: list[str],
) -> tuple[dict[str, Any], np.ndarray | None, tuple[int, int], list[str]]:
    primary, unit = _find_image(stream, size, source)
    shape = image_shape(unit.axes, source)
    cards = {name: value for name, value in unit.cards.items() if not is_storage_card(name)}
    notes += unit.notes
    if unit is not primary and not primary.axes:  # some archives put the keywords into the empty primary header
        for name, value in primary.cards.items():
            if not is_storage_card(name) and name not in ("COMMENT", "HISTORY"):
                cards.setdefault(name, value)
    cards["BITPIX"] = int(number(unit.cards, "ZBITPIX" if unit.compressed else "BITPIX") or 0)
    cards["NAXIS"], (cards["NAXIS2"], cards["NAXIS1"]) = 2, shape
    if cards["BITPIX"] not in _TYPES:
        raise SolarImageError(source, "BITPIX", f"one of {', '.join(map(str, _TYPES))}", f"{cards['BITPIX']}")
    if header_only:
        return cards, None, shape, notes
    raw = b""
    if not unit.compressed or number(unit.cards, "DATASUM"):
        stream.seek(unit.data_start)
        raw = stream.read(unit.data_bytes)
        notes += _check_sum(unit, raw, source)
    if unit.compressed:
        pixels = _decode_compressed(content, unit, source)
        if pixels.shape != shape:
            raise SolarImageError(source, "ZNAXIS", f"an image of shape {shape}", f"{pixels.shape}")
    else:
        pixels = np.frombuffer(raw, dtype=_TYPES[cards["BITPIX"]]).reshape(shape)
    return cards, physical_pixels(pixels, cards), shape, notes


def image_shape(axes: tuple[int, ...], source: str) -> tuple[int, int]:
    """(H, W) from the axes' lengths, NAXIS1 first; refuses anything but two filled axes."""
    if len(axes) != 2 or min(axes) < 1:
        raise SolarImageError(
            source,
            "NAXIS",
            "a two-dimensional image",
            f"{len(axes)} axes of {' x '.join(map(str, axes))} pixels",
            "Of a cube, write each plane as an image of its own with its header.",
        )
    return axes[1], axes[0]


def physical_pixels(raw: np.ndarray, cards: Mapping[str, Any]) -> np.ndarray:
    """Stored numbers to physical ones: BLANK to NaN for integers, then BSCALE and BZERO, in float32.

    Args:
        raw: (H, W) as stored, of any real type and byte order.
        cards: The header, for BSCALE, BZERO and BLANK.

    Returns:
        (H, W) float32. Infinities of float data become NaN; BLANK means nothing there (FITS standard 4.0, 5.3).
    """
    scale, zero = number(cards, "BSCALE"), number(cards, "BZERO")
    scale, zero = 1.0 if scale is None else scale, zero or 0.0
    integer = raw.dtype.kind in "iu"
    # 32-bit numbers with an offset may lie beyond what float32 tells apart before the offset is added
    working = np.float64 if raw.dtype.itemsize >= 4 and zero else np.float32
    with np.errstate(over="ignore"):  # beyond float32 is as good as infinite
        pixels: np.ndarray = raw.astype(working)  # always a copy: the caller's array is left alone
    if scale != 1.0:
        np.multiply(pixels, working(scale), out=pixels)
    if zero:
        np.add(pixels, working(zero), out=pixels)
    pixels = pixels.astype(np.float32, copy=False)
    blank = number(cards, "BLANK")
    missing = np.isinf(pixels) if not integer else raw == blank if blank is not None else np.False_
    if missing.any():  # rarely so, and a masked write over a whole image costs as much as reading it
        pixels[missing] = np.nan
    return pixels


def _find_image(stream: IO[bytes] | gzip.GzipFile, size: int | None, source: str) -> tuple[FitsUnit, FitsUnit]:
    """Walks the file's units to the first that holds an image; returns the primary unit and that one."""
    primary: FitsUnit | None = None
    position = index = 0
    while True:
        unit = _read_unit(stream, position, index, size, source)
        if unit is None:
            break
        primary = primary or unit
        end = unit.data_start + unit.data_bytes
        if size is not None and end > size:
            raise SolarImageError(
                source,
                f"file size (HDU {index})",
                f"at least {end} bytes as the header says",
                f"{size} bytes",
                "The file is truncated: fetch it again.",
            )
        if unit.axes:
            return primary, unit
        position = -(-end // _BLOCK) * _BLOCK
        index += 1
    raise SolarImageError(
        source,
        "NAXIS",
        "a two-dimensional image in one of the HDUs",
        f"{index} HDUs without an image",
        "If there should be one, the file is truncated: fetch it again.",
    )


def _read_unit(
    stream: IO[bytes] | gzip.GzipFile, position: int, index: int, size: int | None, source: str
) -> FitsUnit | None:
    """The unit whose header begins at `position`; None at the end of the file."""
    stream.seek(position)
    blocks = stream.read(_BLOCK)
    if index == 0 and not blocks.startswith(b"SIMPLE  ="):
        raise _not_fits(blocks, size, source)
    if index and not blocks.startswith(b"XTENSION="):
        return None  # padding or other matter after the last unit
    block = blocks
    while len(block) < _BLOCK or not _has_end(block):
        block = stream.read(_BLOCK)
        blocks += block
        if len(block) < _BLOCK or len(blocks) > _MAX_HEADER_BLOCKS * _BLOCK:
            raise SolarImageError(
                source,
                f"header (HDU {index})",
                "an END card and whole blocks of 2880 bytes",
                f"none within {len(blocks)} bytes",
                "The file is truncated or damaged: fetch it again.",
            )
    header = astropy_fits().Header.fromstring(_legible(blocks))
    cards, notes = _all_cards(header)
    return FitsUnit(index, cards, tuple(notes), position + len(blocks))


def _legible(blocks: bytes) -> bytes:
    """Header text that astropy can parse: printable ASCII only, and JSOC's bare `nan` as the empty value it means."""
    blocks = blocks.translate(_PRINTABLE)
    cards = (blocks[start : start + 80] for start in range(0, len(blocks), 80))
    return b"".join(
        card[:10] + b" " * 70
        if card[8:10] == b"= " and card[10:].partition(b"/")[0].strip().lower() in _NOT_NUMBERS
        else card
        for card in cards
    )


def _all_cards(header: Any) -> tuple[dict[str, Any], list[str]]:
    """Every card of an astropy `Header` as a plain value, the first of duplicates; and a note on broken ones."""
    unparsable = astropy_fits().VerifyError
    cards: dict[str, Any] = {}
    broken: list[str] = []
    for entry in header.cards:
        name = entry.keyword.upper()
        if not name:
            continue
        try:
            value = plain_value(entry.value)
        except unparsable:
            broken.append(name)
            continue
        if name in ("COMMENT", "HISTORY"):
            cards[name] = f"{cards[name]}\n{value}" if name in cards else str(value)
        else:
            cards.setdefault(name, value)
    return cards, [f"Cards that do not parse were left out: {', '.join(broken)}."] if broken else []


def _axes(cards: Mapping[str, Any], prefix: str) -> tuple[int, ...]:
    count = int(number(cards, f"{prefix}NAXIS") or 0)
    return tuple(int(number(cards, f"{prefix}NAXIS{axis + 1}") or 0) for axis in range(min(count, 999)))


def _has_end(block: bytes) -> bool:
    return any(block[start : start + 8] == b"END     " for start in range(0, len(block), 80))


def _not_fits(head: bytes, size: int | None, source: str) -> SolarImageError:
    expected = "a FITS file, which begins with 'SIMPLE  ='"
    if not head:
        return SolarImageError(source, "file", expected, "an empty file", "Fetch the file again.")
    if head.lstrip()[:1] == b"<":
        advice = "The archive answered with an error or index page: check the address and fetch the file again."
        return SolarImageError(source, "file", expected, "an HTML or XML page", advice)
    for magic, what, advice in _KNOWN_CONTENTS:
        if head.startswith(magic):
            return SolarImageError(source, "file", expected, what, advice)
    got = f"{head[:16]!r}" if size is None else f"{size} bytes that begin with {head[:16]!r}"
    return SolarImageError(source, "file", expected, got, "Fetch the file again.")


def _check_sum(unit: FitsUnit, raw: bytes, source: str) -> list[str]:
    """Compares DATASUM, where there is one: a flipped bit in a Rice heap may decode to nonsense without complaint."""
    written = number(unit.cards, "DATASUM")
    if not written:
        return []
    words = np.frombuffer(raw + b"\0" * (-len(raw) % 4), dtype=">u4")
    total = int(words.sum(dtype=np.uint64))
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)  # ones' complement sum (FITS standard 4.0, appendix J)
    if total == int(written):
        return []
    if unit.compressed:
        raise SolarImageError(
            source, "DATASUM", str(int(written)), str(total), "The data is damaged: fetch the file again."
        )
    return ["DATASUM does not agree with the data: the file was changed after it was written."]


def _decode_compressed(content: Path | bytes, unit: FitsUnit, source: str) -> np.ndarray:
    """Decodes a tile-compressed image whole; `.section`, row by row, can crash on a damaged heap."""
    try:
        with astropy_fits().open(
            content if isinstance(content, Path) else io.BytesIO(content), do_not_scale_image_data=True, memmap=False
        ) as units:
            return units[unit.index].data
    except Exception as error:  # astropy and its C code raise many kinds on damaged data
        raise SolarImageError(
            source,
            f"compressed data (HDU {unit.index})",
            "tiles that decode",
            f"{type(error).__name__}: {error}",
            "The data is damaged: fetch the file again.",
        ) from error


__all__ = ["FitsUnit", "astropy_fits", "image_shape", "physical_pixels", "plain_header", "read_fits"]
