"""Where the Sun is in an image: the linear part of the WCS, the apparent radius, the observer."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from .header_cards import instrument_of, is_helioprojective, number, text
from .headers import SolarImageError

# JSOC computes RSUN_OBS = asin(RSUN_REF / DSUN_OBS) with this RSUN_REF (card RSUN_REF of AIA, HMI and MDI headers).
RSUN_REFERENCE = 6.96e8
ASTRONOMICAL_UNIT = 149597870700.0  # m, IAU 2012 resolution B2
_ARCSEC = math.degrees(1.0) * 3600.0  # in a radian

_UNITS = {
    "arcsec": 1.0,
    "asec": 1.0,
    "arcsecond": 1.0,
    "arcseconds": 1.0,
    "deg": 3600.0,
    "degree": 3600.0,
    "degrees": 3600.0,
    "arcmin": 60.0,
    "mas": 1e-3,
    "rad": _ARCSEC,
}

Matrix = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Pointing:
    """The geometric facts of a header; the fields are those of `SolarImage`."""

    crpix: tuple[float, float]
    crval: tuple[float, float]
    cdelt: tuple[float, float]
    rotation: Matrix
    rsun_arcsec: float
    observer_distance: float | None
    b0: float | None
    l0: float | None
    helioprojective: bool
    notes: tuple[str, ...]

    def disk_extent(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Centre (x, y) of the disk in FITS pixels, and half-width and half-height of its image in pixels."""
        (a, b), (c, d) = (
            (scale * row[0], scale * row[1]) for scale, row in zip(self.cdelt, self.rotation, strict=True)
        )
        determinant = a * d - b * c
        inverse = ((d / determinant, -b / determinant), (-c / determinant, a / determinant))
        centre = tuple(
            reference - row[0] * self.crval[0] - row[1] * self.crval[1]
            for reference, row in zip(self.crpix, inverse, strict=True)
        )
        half = tuple(self.rsun_arcsec * math.hypot(*row) for row in inverse)
        return centre, half  # type: ignore[return-value]

    def full_disk(self, shape: tuple[int, int]) -> bool:
        """Whether the disk of radius `rsun_arcsec` lies within a frame of (H, W) pixels, to a pixel or 0.2% of R."""
        if not self.helioprojective:
            return False
        centre, half = self.disk_extent()
        return all(
            middle - radius >= 0.5 - max(1.0, 0.002 * radius)
            and middle + radius <= length + 0.5 + max(1.0, 0.002 * radius)
            for middle, radius, length in zip(centre, half, shape[::-1], strict=True)
        )


def earth_sun_distance(time: datetime) -> float:
    """Distance from the Earth to the Sun in metres, good to 2e-4.

    The low-precision solar coordinates of the Astronomical Almanac (section C, "Low precision formulas for the Sun").
    SDO's orbit adds up to 3e-4. No package is needed, and the result does not depend on what is installed.

    Args:
        time: Time-zone aware.
    """
    days = (time - datetime(2000, 1, 1, 12, tzinfo=UTC)).total_seconds() / 86400.0
    anomaly = math.radians(357.529 + 0.98560028 * days)
    return ASTRONOMICAL_UNIT * (1.00014 - 0.01671 * math.cos(anomaly) - 0.00014 * math.cos(2.0 * anomaly))


def read_pointing(header: Mapping[str, Any], source: str, time: datetime | None) -> Pointing:
    """Reads the geometric facts of a header.

    Args:
        header: Cards as plain values, upper case.
        source: The path or a description, for messages.
        time: Observation time in UTC; needed only where the header gives neither RSUN_OBS nor DSUN_OBS.

    Returns:
        The facts; angles in arcsec, the observer's in degrees.

    Raises:
        SolarImageError: A card of the WCS is missing or makes no sense.
    """
    notes: list[str] = []
    instrument = instrument_of(header)
    units = tuple(_unit(header, name, source) for name in ("CUNIT1", "CUNIT2"))
    crpix = tuple(_required(header, name, source) for name in ("CRPIX1", "CRPIX2"))
    crval = tuple((number(header, name) or 0.0) * unit for name, unit in zip(("CRVAL1", "CRVAL2"), units, strict=True))
    matrix = _linear_matrix(header, source, instrument, notes)
    scaled = tuple(tuple(value * unit for value in row) for row, unit in zip(matrix, units, strict=True))
    cdelt = tuple(math.hypot(*row) for row in scaled)
    determinant = scaled[0][0] * scaled[1][1] - scaled[0][1] * scaled[1][0]
    if not abs(determinant) > 1e-6 * cdelt[0] * cdelt[1] > 0.0:
        raise SolarImageError(
            source, "CDELT1", "an invertible pixel-to-sky matrix", f"{matrix}", "The header's WCS is broken."
        )
    if not (text(header, "CTYPE1") or text(header, "CTYPE2")):
        notes.append("CTYPE1 and CTYPE2 are missing: helioprojective axes assumed.")
    rsun, distance = _apparent_radius(header, source, instrument, time, notes)
    b0 = number(header, "CRLT_OBS", "HGLT_OBS", "SOLAR_B0")
    if b0 is not None and abs(b0) > (7.5 if instrument in ("AIA", "HMI") else 90.0):
        notes.append(f"CRLT_OBS of {b0:g} degrees makes no sense and was left out.")
        b0 = None
    return Pointing(
        crpix=crpix,  # type: ignore[arg-type]
        crval=crval,  # type: ignore[arg-type]
        cdelt=cdelt,  # type: ignore[arg-type]
        rotation=tuple(tuple(value / scale for value in row) for row, scale in zip(scaled, cdelt, strict=True)),  # type: ignore[arg-type]
        rsun_arcsec=rsun,
        observer_distance=distance,
        b0=b0,
        l0=number(header, "CRLN_OBS"),
        helioprojective=is_helioprojective(header),
        notes=tuple(notes),
    )


def _required(header: Mapping[str, Any], name: str, source: str) -> float:
    value = number(header, name)
    if value is None:
        got = text(header, name)
        raise SolarImageError(
            source,
            name,
            "a number that places the Sun in the image",
            repr(got) if got else "no such card",
            "JSOC's 'as-is' exports carry no header cards: export as FITS, or pass the array with modality=.",
        )
    return value


def _unit(header: Mapping[str, Any], name: str, source: str) -> float:
    written = text(header, name)
    if written and written.lower() not in _UNITS:
        raise SolarImageError(source, name, "arcsec or deg", repr(written), "Give the axes in arcsec.")
    return _UNITS[written.lower()] if written else 1.0


def _linear_matrix(header: Mapping[str, Any], source: str, instrument: str, notes: list[str]) -> Matrix:
    """The 2 x 2 matrix from pixel offsets to world coordinates, by CDi_j, PCi_j or CROTA2 (FITS WCS papers I, II)."""
    names = ("1_1", "1_2", "2_1", "2_2")
    cd = [number(header, f"CD{name}") for name in names]
    if any(value is not None for value in cd):
        values = [value or 0.0 for value in cd]
        return (values[0], values[1]), (values[2], values[3])
    x_scale, y_scale = (_required(header, name, source) for name in ("CDELT1", "CDELT2"))
    if not (x_scale and y_scale):
        raise SolarImageError(source, "CDELT1", "a plate scale other than 0", f"{x_scale:g}, {y_scale:g}")
    pc = [number(header, f"PC{name}", f"PC00{name[0]}00{name[2]}") for name in names]
    angle = number(header, "CROTA2", "CROTA")
    if any(value is not None for value in pc):
        # an absent PCi_j is an element of the unit matrix
        values = [default if value is None else value for value, default in zip(pc, (1.0, 0.0, 0.0, 1.0), strict=True)]
        if angle is not None and abs(math.remainder(math.degrees(math.atan2(values[2], values[0])) - angle, 360)) > 0.1:
            notes.append(f"CROTA2 = {angle:g} contradicts PCi_j: PCi_j counts.")
        return (x_scale * values[0], x_scale * values[1]), (y_scale * values[2], y_scale * values[3])
    if angle is None:
        if instrument == "HMI":
            raise SolarImageError(
                source,
                "CROTA2",
                "CROTA2, PCi_j or CDi_j, since HMI images come turned by about 180 degrees",
                "no such card",
                "Fetch the file with its header, or add CROTA2.",
            )
        notes.append("No CROTA2, PCi_j or CDi_j: solar north assumed up.")
        angle = 0.0
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    return (x_scale * cosine, -y_scale * sine), (x_scale * sine, y_scale * cosine)


def _apparent_radius(
    header: Mapping[str, Any], source: str, instrument: str, time: datetime | None, notes: list[str]
) -> tuple[float, float | None]:
    """RSUN_OBS in arcsec and DSUN_OBS in metres, each checked and, where it makes no sense, taken from the other.

    R_SUN is never used: it is in pixels of some other grid.
    """
    near_earth = instrument in ("AIA", "HMI", "MDI")
    radius_range = (930.0, 1000.0) if near_earth else (150.0, 10000.0)
    distance_range = (1.43e11, 1.55e11) if near_earth else (1.4e10, 1e12)
    rsun, distance = number(header, "RSUN_OBS"), number(header, "DSUN_OBS")
    if distance is not None and not distance_range[0] <= distance <= distance_range[1]:
        notes.append(f"DSUN_OBS = {distance:g} m makes no sense and was not used.")
        distance = None
    if rsun is not None and radius_range[0] <= rsun <= radius_range[1]:
        if distance is None:
            return rsun, RSUN_REFERENCE / math.sin(rsun / _ARCSEC)
        from_distance = math.asin(RSUN_REFERENCE / distance) * _ARCSEC
        if abs(rsun / from_distance - 1.0) > 0.003:
            notes.append(f"RSUN_OBS = {rsun:.2f} and DSUN_OBS ({from_distance:.2f} arcsec) disagree: RSUN_OBS counts.")
        return rsun, distance
    written = "missing" if rsun is None else f"{rsun:g} arcsec, which makes no sense"
    if distance is not None:
        notes.append(f"RSUN_OBS is {written}: computed from DSUN_OBS.")
        return math.asin(RSUN_REFERENCE / distance) * _ARCSEC, distance
    if time is None:
        raise SolarImageError(
            source,
            "RSUN_OBS",
            f"the Sun's apparent radius of {radius_range[0]:g} to {radius_range[1]:g} arcsec",
            written,
            "Neither DSUN_OBS nor a time is there to compute it from.",
        )
    notes.append(f"RSUN_OBS is {written}: computed from the date for an observer at the Earth.")
    distance = earth_sun_distance(time)
    return math.asin(RSUN_REFERENCE / distance) * _ARCSEC, distance


__all__ = ["ASTRONOMICAL_UNIT", "RSUN_REFERENCE", "Pointing", "earth_sun_distance", "read_pointing"]
