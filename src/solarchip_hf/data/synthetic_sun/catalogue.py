"""The flare report of the synthetic Sun, and the hazard that no forecast can beat."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from .ephemeris import EPOCH, days_since_epoch, surface_to_observer, viewpoint
from .state import (
    ENERGY_DAYS,
    ENERGY_PER_RELEASE,
    ENERGY_STEP,
    LONGEST_LIFE,
    Region,
    RegionHistory,
    can_release,
    flare_rate,
    mean_release,
    rotation_offset,
    share_above,
)

# The columns of NOAA/NCEI's science-quality GOES XRS flare report, in its order
REPORT_COLUMNS = [
    "time",
    "start_time",
    "end_time",
    "flare_id",
    "xrsb_irrad",
    "flare_class",
    "xrsb_irrad_source",
    "background_irrad",
    "integrated_irrad_peak",
    "integrated_irrad_end",
    "flare_loc_swpc_hgs_lon",
    "flare_loc_swpc_hgs_lat",
    "flare_loc_swpc_source",
    "flare_loc_xrs_hgs_lon",
    "flare_loc_xrs_hgs_lat",
    "flare_loc_xrs_hpc_x",
    "flare_loc_xrs_hpc_y",
    "flare_loc_xrs_source",
    "sequential_flare_num",
    "event_id_swpc",
    "peak_saturated",
    "active_region",
]
SOURCE = "SYNTHETIC"
_LETTERS = ((1e-4, "X"), (1e-5, "M"), (1e-6, "C"), (1e-7, "B"), (1e-8, "A"))


def goes_class(flux: float) -> str:
    """GOES class of a peak flux in W/m2, as `"M2.0"`; digits are cut, not rounded, as NOAA does."""
    for unit, letter in _LETTERS:
        if flux >= unit * (1 - 1e-9):
            return f"{letter}{math.floor(flux / unit * 10 + 1e-6) / 10:.1f}"
    return f"A{flux / 1e-8:.1f}"


def parse_goes_class(text: str | float) -> float:
    """Peak flux in W/m2 of a class such as `"M1.0"`, or of a number already in W/m2.

    Raises:
        ValueError: Neither a class nor a positive number.
    """
    if isinstance(text, int | float) and text > 0:
        return float(text)
    units = {letter: unit for unit, letter in _LETTERS}
    try:
        return units[str(text)[0].upper()] * (float(str(text)[1:]) if len(str(text)) > 1 else 1.0)
    except (KeyError, ValueError, IndexError):
        raise ValueError(f"threshold: expected a GOES class such as 'M1.0' or a flux in W/m2, got {text!r}.") from None


class Background:
    """Soft X-ray background, W/m2: 3e-8 of the quiet corona and 1.2e-8 for 1e21 Mx on the visible disk, a value a day.

    Args:
        regions: All regions that may be alive when it is asked for.
    """

    def __init__(self, regions: list[Region]):
        self._facts = np.array(
            [(r.emergence, r.flux, r.decay_time, r.life, r.longitude, rotation_offset(r.latitude)) for r in regions]
        ).reshape(-1, 6)
        self._days: dict[int, float] = {}

    def at(self, days: float) -> float:
        """The background at noon of the day of `days`."""
        day = math.floor(days)
        if day not in self._days:
            emergence, flux, decay, life, longitude, drift = self._facts.T
            age = day + 0.5 - emergence
            distance = (longitude + drift * age - viewpoint(day + 0.5).l0 + 180.0) % 360.0 - 180.0
            seen = (age > 0) & (age < life) & (np.abs(distance) < 75.0)
            age, decay = age[seen], decay[seen]
            visible = flux[seen] * (1.0 - np.exp(-age / 1.5)) * np.exp(-age / (1.8 * decay))
            self._days[day] = 3e-8 + 1.2e-8 * float(visible.sum())
        return self._days[day]


def flare_report(history: RegionHistory, start: float, end: float) -> pd.DataFrame:
    """All flares that start on the visible disk in [start, end) and rise above the background.

    Args:
        history: The active regions.
        start: Days since the epoch.
        end: Days since the epoch.

    Returns:
        The columns of the NOAA/NCEI report; times UTC, fluxes W/m2, fluences J/m2, angles in degrees and arcsec.
    """
    background = Background(history.between(start - LONGEST_LIFE, end))
    rows = []
    for region in history.between(start - ENERGY_DAYS, end):
        for flare in region.history.flares:
            if not start <= flare.start < end:
                continue
            floor = background.at(flare.start)
            if flare.flux < floor:
                continue
            longitude = region.meridian_distance(flare.start)
            if abs(longitude) < 90.0:
                rows.append(_row(region, flare, longitude, floor))
    frame = pd.DataFrame(rows, columns=REPORT_COLUMNS)
    frame = frame.sort_values(["start_time", "xrsb_irrad"], ignore_index=True)
    for column in ("time", "start_time", "end_time"):
        frame[column] = pd.to_datetime(frame[column])
    return frame


def _row(region: Region, flare, longitude: float, floor: float) -> dict:
    start, peak, end = (_minute(moment) for moment in (flare.start, flare.peak, flare.end))
    peak = max(peak, start + pd.Timedelta("1min"))
    end = max(end, peak + pd.Timedelta("1min"))
    seen = viewpoint(flare.start)
    x, y, _ = surface_to_observer(np.array(region.latitude), np.array(longitude), seen.b0)
    rise, fall = (flare.peak - flare.start) * 86400.0, (flare.end - flare.peak) * 86400.0
    return {
        "time": peak,
        "start_time": start,
        "end_time": end,
        "flare_id": f"{start:%Y%m%d%H%M}",
        "xrsb_irrad": flare.flux,
        "flare_class": goes_class(flare.flux),
        "xrsb_irrad_source": SOURCE,
        "background_irrad": floor,
        "integrated_irrad_peak": 0.5 * flare.flux * rise,
        "integrated_irrad_end": 0.5 * flare.flux * rise + 0.7 * flare.flux * fall,
        "flare_loc_swpc_hgs_lon": round(longitude),
        "flare_loc_swpc_hgs_lat": round(region.latitude),
        "flare_loc_swpc_source": SOURCE,
        "flare_loc_xrs_hgs_lon": round(longitude, 1),
        "flare_loc_xrs_hgs_lat": round(region.latitude, 1),
        "flare_loc_xrs_hpc_x": round(float(x) * seen.rsun_arcsec, 1),
        "flare_loc_xrs_hpc_y": round(float(y) * seen.rsun_arcsec, 1),
        "flare_loc_xrs_source": SOURCE,
        "sequential_flare_num": 1,
        "event_id_swpc": None,
        "peak_saturated": 0,
        "active_region": region.number,
    }


def _minute(days: float) -> pd.Timestamp:
    return (EPOCH + pd.Timedelta(days, "D")).floor("min")


def hazard(
    history: RegionHistory, times: Iterable, horizon: str | pd.Timedelta, thresholds: Sequence[str | float]
) -> np.ndarray:
    """Probability that a flare of at least each threshold starts within `horizon` of t, given all that is hidden.

    The generating process is followed in the mean: the forcing relaxes, energy is fed, leaks and is spent by the
    expected flares, and the rate of flares above the threshold, and above the background that would hide them, is
    summed over the regions while they face the Earth. Regions that have not yet emerged are not known. No forecast from
    images can do better in the long run.

    Args:
        history: The active regions.
        times: UTC times.
        horizon: A pandas time span.
        thresholds: T GOES classes, or fluxes in W/m2.

    Returns:
        (len(times), T) probabilities.

    Raises:
        ValueError: A threshold is no class, or the horizon is not positive.
    """
    span = pd.Timedelta(horizon) / pd.Timedelta("1D")
    if not span > 0:
        raise ValueError(f"horizon: expected a positive time span such as '24h', got {horizon!r}.")
    fluxes = [parse_goes_class(threshold) for threshold in thresholds]
    steps = max(1, round(span / ENERGY_STEP))
    step = span / steps
    rows = []
    for time in times:
        days = days_since_epoch(time)
        alive = history.alive(days)
        regions = [region for region in alive if days - region.emergence < ENERGY_DAYS - span]
        row = np.zeros(len(fluxes))
        if regions:
            floor = Background(alive).at(days)
            row = _expected_flares(regions, days, step, steps, [max(flux, floor) for flux in fluxes])
        rows.append(row)
    return -np.expm1(-np.reshape(rows, (len(rows), len(fluxes))))


def _expected_flares(
    regions: list[Region], days: float, step: float, steps: int, thresholds: Sequence[float]
) -> np.ndarray:
    """(T,) expected numbers of flares of at least each threshold, W/m2, in `steps` steps of `step` days."""
    index = [min(int((days - r.emergence) / ENERGY_STEP), len(r.history.energy) - 1) for r in regions]
    energy = np.array([r.history.energy[i] for r, i in zip(regions, index, strict=True)])
    forcing = np.array([r.history.forcing[i] for r, i in zip(regions, index, strict=True)])
    complexity = np.array([r.complexity for r in regions])
    longitude = np.array([r.meridian_distance(days) for r in regions])
    total = np.zeros(len(thresholds))
    for number in range(steps):
        lead = (number + 0.5) * step
        age = np.array([days + lead - r.emergence for r in regions])
        decay = np.array([1.5 * r.decay_time for r in regions])
        flux = np.array([r.flux for r in regions]) * (1.0 - np.exp(-age / 1.5)) * np.exp(-age / decay)
        rate = flare_rate(energy, flux)
        facing = rate * can_release(energy) * (np.abs(longitude + 13.2 * lead) < 90.0)
        total += step * np.array([float((facing * share_above(peak, flux)).sum()) for peak in thresholds])
        # mean of exp(0.7 z) for z relaxing from its value now to a unit normal
        memory = math.exp(-lead / 2.0)
        mean_drive = np.exp(0.7 * memory * forcing + 0.245 * (1.0 - memory**2) - 0.245)
        feeding = 0.3 * complexity**1.5 * mean_drive * flux**1.5
        spent = ENERGY_PER_RELEASE * mean_release(energy) * rate
        energy = np.maximum(energy + step * (feeding - 0.1 * energy - spent), 0.0)
    return total
