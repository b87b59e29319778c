"""The one table of SDO channels: names, instruments, units, exposures, aliases."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .header_cards import instrument_of, is_helioprojective, number, text


@dataclass(frozen=True)
class Modality:
    """One image channel of the Solar Dynamics Observatory.

    Attributes:
        name: The name used everywhere in the package, as `"aia171"`.
        instrument: `"hmi"` or `"aia"`.
        wavelength: Passband in angstrom.
        unit: Unit of the archive's full-disk images: `"G"` or `"DN"`.
        signed: Whether the physical quantity has a sign.
        nominal_exposure: Exposure in seconds that `photometry="nominal"` refers to; None for HMI.
        cadence: Cadence in seconds of the nominal slots of the series that is read; AIA's level 1 has its own.
        colormap: Name of sunpy's colour map for the channel.
    """

    name: str
    instrument: str
    wavelength: int
    unit: str
    signed: bool
    nominal_exposure: float | None
    cadence: float
    colormap: str

    @property
    def label(self) -> str:
        """A heading for figures, as `AIA 171 Å`."""
        return "HMI magnetogram" if self.instrument == "hmi" else f"AIA {self.wavelength} Å"


def _aia(wavelength: int, exposure: float, cadence: float = 120.0) -> Modality:
    name = f"aia{wavelength}"
    return Modality(name, "aia", wavelength, "DN", False, exposure, cadence, f"sdo{name}")


# Nominal exposures are those of AIA's regular synoptic programme outside flares. The synoptic series has a frame every
# two minutes; 4500 comes once an hour. `hmi.M_720s` has a slot every 720 s, on TAI.
MODALITIES: Mapping[str, Modality] = {
    modality.name: modality
    for modality in (
        Modality("hmi", "hmi", 6173, "G", True, None, 720.0, "hmimag"),
        _aia(94, 2.9),
        _aia(131, 2.9),
        _aia(171, 2.0),
        _aia(193, 2.0),
        _aia(211, 2.9),
        _aia(304, 2.9),
        _aia(335, 2.9),
        _aia(1600, 2.9),
        _aia(1700, 1.0),
        _aia(4500, 1.0, 3600.0),
    )
}
MODALITY_NAMES: tuple[str, ...] = tuple(MODALITIES)

_HMI_ALIASES = frozenset({"hmi", "hmim", "hmimag", "hmimagnetogram", "magnetogram", "hmi6173", "hmiblos", "blos", "bz"})


def resolve_modality(alias: str | int) -> str:
    """Turns a way of writing a channel into its name in this package.

    Args:
        alias: `171`, `"0171"`, `"171A"`, `"AIA_171"`, `"aia171"`, `"HMI"`, `"hmi_m"`, ...

    Returns:
        One of `MODALITY_NAMES`.

    Raises:
        ValueError: The alias names no channel of the table.
    """
    text = re.sub(r"[^a-z0-9]", "", str(alias).lower())
    if text in _HMI_ALIASES:
        return "hmi"
    match = re.fullmatch(r"(?:sdo)?(?:aia)?0*(\d+)(?:a|angstrom)?", text)
    if match and f"aia{match[1]}" in MODALITIES:
        return f"aia{match[1]}"
    raise ValueError(
        f"modality: expected one of {', '.join(MODALITY_NAMES)} (or an alias such as '0171', '171A', 'AIA_171'), "
        f"got {alias!r}."
    )


def wavelength_of(header: Mapping[str, Any]) -> float | None:
    """WAVELNTH in angstrom, whatever WAVEUNIT says; None where absent. A missing or unknown WAVEUNIT is angstrom."""
    wavelength = number(header, "WAVELNTH")
    if wavelength is None:
        return None
    unit = text(header, "WAVEUNIT").lower()
    return wavelength * {"nm": 10.0, "nanometer": 10.0, "um": 1e4, "micron": 1e4, "m": 1e10}.get(unit, 1.0)


def detect_modality(header: Mapping[str, Any]) -> str | None:
    """Finds the channel that a header describes.

    AIA channels are told by WAVELNTH. HMI's magnetogram is told by CONTENT (or, without it, by the segment in
    DRMS_ID), never by BUNIT: HMI writes continuum, Dopplergrams and SHARP patches with the same INSTRUME. Patches and
    map projections (HARPNUM, CTYPE other than helioprojective) are no channel of the table, whatever their content.

    Args:
        header: A dict, an astropy `Header` or the `meta` of a sunpy Map.

    Returns:
        One of `MODALITY_NAMES`, or None.
    """
    if not is_helioprojective(header):
        return None
    instrument = instrument_of(header)
    if instrument == "AIA":
        wavelength = wavelength_of(header)
        name = f"aia{round(wavelength)}" if wavelength is not None else ""
        return name if name in MODALITIES else None
    if instrument == "HMI" and number(header, "HARPNUM") is None:
        content = text(header, "CONTENT")
        segment = content if content else text(header, "DRMS_ID").rpartition(":")[2]
        return "hmi" if segment.upper() == "MAGNETOGRAM" else None
    return None


__all__ = ["MODALITIES", "MODALITY_NAMES", "Modality", "detect_modality", "resolve_modality", "wavelength_of"]
