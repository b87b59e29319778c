"""The QUALITY words of AIA and HMI. Their bits differ between the instruments."""

# Level 1 of AIA: SDO User Guide, section 7.7.6, table 2. The image may not show the Sun as it is.
_AIA_REJECT = {
    9: "more than 1% of the pixels are missing",
    10: "more than 5% of the pixels are missing",
    11: "more than 25% of the pixels are missing",
    12: "the spacecraft is not in science pointing mode",
    13: "eclipse",
    14: "no Sun in the guide telescopes",
    15: "the spacecraft is in safe mode",
    16: "dark image",
    17: "the image stabilisation loop is open",
    18: "calibration image",
    20: "focus out of range",
    21: "register flag",
    31: "image not available",
}
_AIA_WARN = {
    0: "flat field not available",
    1: "orbit data not available",
    2: "ancillary science data not available",
    3: "no master pointing: the pointing is approximate",
    8: "some pixels are missing",
}

# Observables of HMI: JSOC, doc/data/hmi/Quality_Bits/QUALITY.txt, 24 May 2013.
_HMI_REJECT = {
    7: "no polynomial coefficients for the observable",
    9: "polynomial coefficients unreadable",
    17: "not enough level 1p records",
    18: "temporal interpolation failed",
    19: "not enough interpolation points",
    20: "look-up tables unreadable",
    21: "no look-up tables",
    22: "level 1p keywords missing",
    23: "wrong number of wavelengths",
    24: "level 1d keywords missing",
    25: "not enough level 1d filtergrams",
    26: "wrong target filtergram",
    27: "wrong cadence",
    28: "unknown frame list",
    29: "keywords could not be interpolated",
    30: "target filtergram missing",
    31: "no data",
}
_HMI_WARN = {
    5: "poor quality",
    6: "noisier frame list",
    8: "taken in part during an eclipse",
    11: "limb-fit problem in some filtergrams",
    12: "filtergrams not fully gap-filled",
    13: "default temperatures used",
    14: "the image stabilisation loop was open for some filtergrams",
    15: "keywords extrapolated",
    16: "few interpolation points",
}  # 10, no cosmic-ray hit list, is usual in near real time and accepted silently

_TABLES = {"AIA": (_AIA_REJECT, _AIA_WARN), "HMI": (_HMI_REJECT, _HMI_WARN)}
AIA_NEAR_REAL_TIME_BIT = 30


def parse_quality(value: object) -> int | None:
    """A QUALITY card as an unsigned 32-bit word; None where absent or unreadable.

    Args:
        value: An integer, perhaps negative (bit 31 of a signed word), or text such as `"0x00000400"`.
    """
    if value is None or isinstance(value, bool):
        return None
    try:
        word = int(value, 0) if isinstance(value, str) else int(value)  # type: ignore[call-overload]
    except (ValueError, OverflowError):
        return None
    return word & 0xFFFFFFFF


def decode_quality(instrument: str, quality: int | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Reads a QUALITY word by the table of its instrument.

    Near-real-time AIA data has bit 30 set and is not rejected for it; comparing QUALITY with zero would drop it all.

    Args:
        instrument: `"AIA"` (level 1 and what is made of it) or `"HMI"` (observables); of any other instrument the bits
            are unknown and nothing is decoded.
        quality: The word; None where the header has none.

    Returns:
        Reasons to reject the image, and warnings; each names its bit.
    """
    if quality is None or instrument.upper() not in _TABLES:
        return (), ()
    reject, warn = _TABLES[instrument.upper()]
    return _named_bits(reject, quality), _named_bits(warn, quality)


def _named_bits(table: dict[int, str], quality: int) -> tuple[str, ...]:
    return tuple(f"QUALITY bit {bit}: {meaning}" for bit, meaning in table.items() if quality >> bit & 1)


__all__ = ["AIA_NEAR_REAL_TIME_BIT", "decode_quality", "parse_quality"]
