"""Where the Earth sees the Sun from: distance, B0, L0, and the two clocks of SDO's archives."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

EPOCH = pd.Timestamp("2010-05-01")  # day 0 of the package's internal time axis, UTC: the first day of SDO's archives
EPOCH_JULIAN_DATE = 2455317.5

ASTRONOMICAL_UNIT = 149_597_870_691.0  # m, the DSUN_REF card of SDO files
SOLAR_RADIUS = 696_000_000.0  # m, the RSUN_REF card of SDO files
SYNODIC_RATE = 13.1988  # deg/day, mean motion of the central meridian in Carrington longitude
CARRINGTON_RATE = 14.1844  # deg/day, sidereal

# TAI - UTC in seconds from the given UTC date on (IERS Bulletin C); none has been added since 2017.
_LEAP_SECONDS = (
    (pd.Timestamp("2017-01-01"), 37.0),
    (pd.Timestamp("2015-07-01"), 36.0),
    (pd.Timestamp("2012-07-01"), 35.0),
    (pd.Timestamp("2009-01-01"), 34.0),
)


@dataclass(frozen=True)
class Viewpoint:
    """How the Earth sees the Sun at one instant.

    Attributes:
        b0: Heliographic latitude of the disk centre in degrees.
        l0: Carrington longitude of the disk centre in degrees, 0 to 360.
        distance: Distance from the Sun's centre in metres.
        rsun_arcsec: Apparent radius of the photosphere in arcsec.
        carrington_rotation: Number of the Carrington rotation.
    """

    b0: float
    l0: float
    distance: float
    rsun_arcsec: float
    carrington_rotation: int


def as_utc(time: Any) -> pd.Timestamp:
    """Reads a time given in any usual way as a naive UTC timestamp.

    Args:
        time: A string, `datetime`, `numpy.datetime64` or `pandas.Timestamp`; without a zone it is UTC.

    Raises:
        ValueError: The time cannot be read, or is not a time (NaT).
    """
    stamp = pd.Timestamp(time)
    if not isinstance(stamp, pd.Timestamp) or pd.isna(stamp):
        raise ValueError(f"time: expected a date and time such as '2014-01-01T00:00', got {time!r}.")
    return stamp.tz_convert("UTC").tz_localize(None) if stamp.tzinfo is not None else stamp


def days_since_epoch(time: Any) -> float:
    """Turns a UTC time into days since `EPOCH`."""
    return (as_utc(time) - EPOCH) / pd.Timedelta("1D")


def tai_minus_utc(utc: pd.Timestamp) -> float:
    """TAI - UTC in seconds, for the years in which SDO has flown (34 before that)."""
    return next((seconds for since, seconds in _LEAP_SECONDS if utc >= since), 34.0)


def tai_to_utc(tai: pd.Timestamp) -> pd.Timestamp:
    """Turns a TAI label into UTC."""
    first_guess = tai - pd.Timedelta(seconds=tai_minus_utc(tai))
    return tai - pd.Timedelta(seconds=tai_minus_utc(first_guess))


def viewpoint(days: float) -> Viewpoint:
    """The Earth's view of the Sun by the low-accuracy series of Meeus, Astronomical Algorithms (1998), ch. 25 and 29.

    Args:
        days: UTC days since `EPOCH`.

    Returns:
        The `Viewpoint`; angles are good to about 0.01 degrees, the distance to 1e-5.
    """
    julian_date = EPOCH_JULIAN_DATE + days
    centuries = (julian_date - 2451545.0) / 36525.0
    mean_longitude = 280.46646 + 36000.76983 * centuries
    anomaly = math.radians(357.52911 + 35999.05029 * centuries)
    centre = (
        (1.914602 - 0.004817 * centuries) * math.sin(anomaly)
        + 0.019993 * math.sin(2 * anomaly)
        + 0.000289 * math.sin(3 * anomaly)
    )
    eccentricity = 0.016708634 - 4.2037e-5 * centuries
    distance = 1.000001018 * (1 - eccentricity**2) / (1 + eccentricity * math.cos(anomaly + math.radians(centre)))
    node_of_moon = math.radians(125.04 - 1934.136 * centuries)
    longitude = mean_longitude + centre - 0.00569 - 0.00478 * math.sin(node_of_moon)

    inclination = math.radians(7.25)
    node = 73.6667 + 1.3958333 * (julian_date - 2396758.0) / 36525.0
    argument = math.radians(longitude - node)
    b0 = math.degrees(math.asin(math.sin(argument) * math.sin(inclination)))
    eta = math.degrees(math.atan2(-math.sin(argument) * math.cos(inclination), -math.cos(argument)))
    l0 = (eta - (julian_date - 2398220.0) * 360.0 / 25.38) % 360.0

    rotation = (julian_date - 2398140.2270) / 27.2752316  # ch. 29: rotation C begins at 2398140.227 + 27.2752316 C
    # the fraction is taken from L0 itself, so that number and longitude turn over together
    number = round(rotation - (1.0 - l0 / 360.0))
    metres = distance * ASTRONOMICAL_UNIT
    return Viewpoint(b0, l0, metres, math.degrees(math.asin(SOLAR_RADIUS / metres)) * 3600.0, number)


def surface_to_observer(latitude: np.ndarray, longitude: np.ndarray, b0: float) -> np.ndarray:
    """Unit vectors of surface points in the observer's frame.

    Args:
        latitude: Heliographic latitude in degrees, any shape (...).
        longitude: Longitude from the central meridian in degrees, westward positive, (...).
        b0: Latitude of the disk centre in degrees.

    Returns:
        (3, ...) with x to solar west, y to solar north on the plane of the sky, z towards the observer.
    """
    phi, lam, tilt = np.radians(latitude), np.radians(longitude), math.radians(b0)
    cos_phi, sin_phi = np.cos(phi), np.sin(phi)
    towards = cos_phi * np.cos(lam)
    return np.stack(
        [
            cos_phi * np.sin(lam),
            sin_phi * math.cos(tilt) - towards * math.sin(tilt),
            sin_phi * math.sin(tilt) + towards * math.cos(tilt),
        ]
    )
