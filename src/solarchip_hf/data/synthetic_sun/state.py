"""The hidden state of the Sun: active regions, the energy that they store, and the flares that release it.

Everything is a function of (seed, time). The time axis is cut into blocks of ten days; a block's emergences come from
a generator keyed by (seed, block), a region's own history from one keyed by (seed, region). Any day can therefore be
drawn in any order and in any process, and the Sun of a seed is the same whatever span a user asks for.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter

import numpy as np

from .ephemeris import CARRINGTON_RATE, SYNODIC_RATE, viewpoint

# The last minimum before SDO's launch was that of December 2008 (SILSO, 13-month smoothed); 4018 days are 11 years.
CYCLE_DAYS = 4018.0
CYCLE_START = -516.0  # 2008-12-01 in days since the epoch

BLOCK_DAYS = 10.0
ENERGY_STEP = 0.125  # days
ENERGY_DAYS = 40.0  # a region older than this no longer flares
LONGEST_LIFE = 90.0  # days
FRAGMENTS_PER_POLARITY = 14
NEST_DAYS = 60.0
NESTED_SHARE = 0.35

# Flares are releases of stored energy. Size of a release, without a unit:
SMALLEST_RELEASE = 0.025
RELEASE_INDEX = 0.6  # N(> x) ~ x**-0.6, cumulative
ENERGY_PER_RELEASE = 12.8
LARGEST_PER_ENERGY = 1.0 / 20.0
# Soft X-ray peak that a release shows, in units of 1e-5 W/m2, the M1 level: the larger the release among those that its
# region may have, the brighter, by a power law that steepens at M3 and ends at a largest peak, which grows with the
# flux of the region. Chosen over seeds 0 to 2 and the years 2012 to 2015 to lie by the operational and science-quality
# lists of those years (two scales, a factor of 1.4 apart); tests/data/test_synthetic_sun_flares.py holds it there.
M1_FLUX = 1e-5  # W/m2
SMALLEST_PEAK = 0.015
BREAK_PEAK = 3.0
PEAK_INDICES = (0.6, 1.1)  # N(> peak) ~ peak**-index, below and above the break
LARGEST_PEAK = 8.0  # of a region of 1e22 Mx
LARGEST_PEAK_EXPONENT = 2.5

# Streams of random numbers: the second word of every seed sequence
EMERGENCE, FRAGMENTS, ENERGY, SURFACE, LOOPS, NOISE, POINTING = range(1, 8)
_OFFSET = 1_000_000  # keys of a seed sequence must not be negative


def generator(seed: int, stream: int, *keys: int) -> np.random.Generator:
    """A generator for one named purpose; the same numbers in every process."""
    return np.random.default_rng([seed, stream, *(int(key) + _OFFSET for key in keys)])


def cycle_phase(days: float | np.ndarray) -> float | np.ndarray:
    """Phase of the activity cycle, 0 at minimum, 0 to 1."""
    return ((days - CYCLE_START) / CYCLE_DAYS) % 1.0


def cycle_parity(days: float) -> int:
    """Sign of northern leading spots: -1 from December 2008 on (cycle 24), +1 in the next cycle, and so on."""
    return -1 if math.floor((days - CYCLE_START) / CYCLE_DAYS) % 2 == 0 else 1


def emergence_rate(days: float | np.ndarray) -> float | np.ndarray:
    """Emerging active regions a day, over the whole Sun."""
    return 0.06 + 1.6 * np.sin(np.pi * cycle_phase(days)) ** 1.7


def rotation_offset(latitude: float | np.ndarray) -> float | np.ndarray:
    """Drift in Carrington longitude, deg/day, of magnetic features (Snodgrass 1983; Howard 1990)."""
    sine_squared = np.sin(np.radians(latitude)) ** 2
    return 14.38 - 1.95 * sine_squared - 2.17 * sine_squared**2 - CARRINGTON_RATE


@dataclass(frozen=True)
class Flare:
    """One flare, in days since the epoch and W/m2 (GOES 1-8 angstrom)."""

    start: float
    peak: float
    end: float
    flux: float


@dataclass(frozen=True)
class EnergyHistory:
    """Free magnetic energy of a region at steps of `ENERGY_STEP` after emergence, and the flares that it fed.

    Attributes:
        energy: (steps,) stored energy.
        injection: (steps,) input a day.
        forcing: (steps,) the Ornstein-Uhlenbeck process behind the injection.
        flux: (steps,) unsigned flux of one polarity, 1e21 Mx.
        flares: In order of time.
    """

    energy: np.ndarray
    injection: np.ndarray
    forcing: np.ndarray
    flux: np.ndarray
    flares: tuple[Flare, ...]


@dataclass(frozen=True, eq=False)
class Region:
    """One active region.

    Attributes:
        number: A number of its own, as NOAA's.
        emergence: Days since the epoch.
        latitude: Degrees.
        longitude: Carrington longitude at emergence, degrees.
        flux: Largest flux of one polarity, 1e21 Mx.
        leader_sign: Polarity of the leading half, +1 or -1 (Hale's law, violated by 5%).
        tilt: Angle of the bipole's axis to the parallel, radians, leader towards the equator positive (Joy's law).
        complexity: Dimensionless, 1 in the median; large for mixed polarities.
        seed: Seed of the Sun.
    """

    number: int
    emergence: float
    latitude: float
    longitude: float
    flux: float
    leader_sign: int
    tilt: float
    complexity: float
    seed: int = field(repr=False)

    @property
    def separation(self) -> float:
        """Distance of the two polarities in degrees."""
        return 2.1 * self.flux**0.38

    @cached_property
    def decay_time(self) -> float:
        """Days; the flux of one polarity falls by e in 1.8 of these."""
        return 2.3 + 3.4 * math.sqrt(self.flux)

    @cached_property
    def life(self) -> float:
        """Days after which nothing of the region is drawn."""
        return min(LONGEST_LIFE, 6.0 * self.decay_time + 10.0)

    @cached_property
    def _drift(self) -> float:
        return float(rotation_offset(self.latitude))

    def flux_at(self, days: float) -> float:
        """Flux of one polarity, 1e21 Mx."""
        age = days - self.emergence
        if not 0.0 < age < self.life:
            return 0.0
        return self.flux * (1.0 - math.exp(-age / 1.5)) * math.exp(-age / (1.8 * self.decay_time))

    def longitude_at(self, days: float | np.ndarray) -> float | np.ndarray:
        """Carrington longitude in degrees, carried by differential rotation."""
        return self.longitude + self._drift * (days - self.emergence)

    def meridian_distance(self, days: float, l0: float | None = None) -> float:
        """Longitude from the central meridian, degrees, -180 to 180, westward positive; `l0` if it is known already."""
        return float((self.longitude_at(days) - (viewpoint(days).l0 if l0 is None else l0) + 180.0) % 360.0 - 180.0)

    @cached_property
    def fragments(self) -> np.ndarray:
        """(2 x 14, 4): offset along the axis and across it in degrees, share of flux (signed by leader +, follower -),
        width at emergence in degrees. The first row is the leading spot."""
        random = generator(self.seed, FRAGMENTS, self.number)
        closeness = 1.0 - 0.45 * min(self.complexity**1.5, 6.0) / 6.0
        size = (self.flux / 4.0) ** 0.25
        halves = []
        for side, spread, spot_share, spot_width in ((1, 0.22, 0.45, 0.70), (-1, 0.38, 0.20, 0.60)):
            share = random.dirichlet(np.full(FRAGMENTS_PER_POLARITY, 0.7))
            share[0] = spot_share
            share[1:] *= (1.0 - spot_share) / max(share[1:].sum(), 1e-9)
            along = side * 0.5 * self.separation * closeness + random.normal(
                0.0, spread * self.separation, FRAGMENTS_PER_POLARITY
            )
            across = random.normal(0.0, spread * self.separation, FRAGMENTS_PER_POLARITY)
            if side > 0:
                along[0], across[0] = 0.5 * self.separation * closeness, 0.0
            width = np.full(FRAGMENTS_PER_POLARITY, 0.45)
            width[0] = spot_width
            halves.append(np.stack([along, across, side * share, width * size], axis=1))
        return np.concatenate(halves)

    @cached_property
    def history(self) -> EnergyHistory:
        """Energy and flares, three hours a step.

        de/dt = 0.3 c**1.5 exp(0.7 z - 0.245) F**1.5 - 0.1 e - 12.8 x for every release of size x, with z an
        Ornstein-Uhlenbeck process of two days. F**1.5 is the scaling of free energy with flux (Aschwanden 2013 finds
        exponents about 1.4 to 1.6).
        """
        random = generator(self.seed, ENERGY, self.number)
        ages = np.arange(0.0, min(self.life, ENERGY_DAYS), ENERGY_STEP)
        # the envelope of flaring is a little shorter than that of the flux: it is young regions that flare
        flux = self.flux * (1.0 - np.exp(-ages / 1.5)) * np.exp(-ages / (1.5 * self.decay_time))
        steps = len(ages)
        memory = math.exp(-ENERGY_STEP / 2.0)
        shocks = random.normal(size=steps)
        forcing = np.empty(steps)
        forcing[0] = shocks[0]
        for step in range(1, steps):
            forcing[step] = memory * forcing[step - 1] + math.sqrt(1.0 - memory**2) * shocks[step]
        injection = 0.3 * self.complexity**1.5 * np.exp(0.7 * forcing - 0.245) * flux**1.5
        energy = np.zeros(steps)
        stored = 0.0
        flares = []
        for step, (gain, unsigned) in enumerate(zip(injection.tolist(), flux.tolist(), strict=True)):
            stored += ENERGY_STEP * (gain - 0.1 * stored)
            energy[step] = stored
            # the scalar twin of `flare_rate`: NumPy is slow on single numbers, and this loop runs a million times
            rate = 0.3 * min(stored / (unsigned**1.5 + 1e-9), 4.0) ** 2 * math.sqrt(min(unsigned, 40.0))
            for _ in range(random.poisson(rate * ENERGY_STEP)):
                largest = stored * LARGEST_PER_ENERGY
                if largest <= SMALLEST_RELEASE:
                    break
                uniform, onset, rise, fall = random.random(4).tolist()
                size = _draw_release(uniform, largest)
                stored -= ENERGY_PER_RELEASE * size
                start = self.emergence + (step + onset) * ENERGY_STEP
                # minutes: larger flares last longer (Veronig et al. 2002: medians of 6 up and 11 down for class M)
                rise, fall = (minutes * size**0.2 * 4.0 ** (u - 0.5) / 1440.0 for minutes, u in ((6, rise), (11, fall)))
                peak = _draw_peak(uniform, unsigned)
                flares.append(Flare(start, start + rise, start + rise + fall, peak * M1_FLUX))
        return EnergyHistory(energy, injection, forcing, flux, tuple(sorted(flares, key=attrgetter("start"))))

    def stress_at(self, days: float) -> float:
        """Energy per F**1.5: how far the region is from a potential field; drives shear and hot loops."""
        index = int((days - self.emergence) / ENERGY_STEP)
        if not 0 <= index < len(self.history.energy):
            return 0.0
        return float(self.history.energy[index] / (self.history.flux[index] ** 1.5 + 1e-6))

    def flaring_at(self, days: float) -> float:
        """Soft X-ray flux of the flares in progress, W/m2: linear rise, exponential decay."""
        total = 0.0
        for flare in self.history.flares:
            if flare.start <= days < flare.end + 0.1:
                rising = (days - flare.start) / (flare.peak - flare.start)
                falling = math.exp(-(days - flare.peak) / (1.5 * (flare.end - flare.peak)))
                total += flare.flux * min(rising, falling if days > flare.peak else 1.0)
        return total


def flare_rate(energy: float | np.ndarray, flux: float | np.ndarray) -> float | np.ndarray:
    """Flares a day, of any size, of a region with `energy` and `flux` (1e21 Mx)."""
    return 0.3 * np.minimum(energy / (flux**1.5 + 1e-9), 4.0) ** 2 * np.sqrt(np.minimum(flux, 40.0))


def largest_peak(flux: float | np.ndarray) -> float | np.ndarray:
    """Peak of the largest flare, in units of M1, of a region with `flux` (1e21 Mx)."""
    return np.maximum(LARGEST_PEAK * (flux / 10.0) ** LARGEST_PEAK_EXPONENT, SMALLEST_PEAK * (1.0 + 1e-9))


def share_above(threshold: float, flux: np.ndarray) -> np.ndarray:
    """Probability that a flare of a region with `flux` (1e21 Mx) peaks above `threshold` (W/m2)."""
    top = _tail(largest_peak(flux))
    peak = np.clip(threshold / M1_FLUX, SMALLEST_PEAK, largest_peak(flux))
    return np.asarray((_tail(peak) - top) / (1.0 - top))


def _tail(peak: float | np.ndarray) -> float | np.ndarray:
    """N(> peak) of the power law with its break and without its end, 1 at the smallest peak."""
    below, above = PEAK_INDICES
    low, high = np.minimum(peak, BREAK_PEAK), np.maximum(peak, BREAK_PEAK)
    return (low / SMALLEST_PEAK) ** -below * (high / BREAK_PEAK) ** -above


def _draw_peak(uniform: float, flux: float) -> float:
    below, above = PEAK_INDICES
    tail = 1.0 - uniform * (1.0 - float(_tail(largest_peak(flux))))
    at_break = (BREAK_PEAK / SMALLEST_PEAK) ** -below
    if tail > at_break:
        return SMALLEST_PEAK * tail ** (-1.0 / below)
    return BREAK_PEAK * (tail / at_break) ** (-1.0 / above)


def mean_release(energy: np.ndarray) -> np.ndarray:
    """Mean size of the releases of a region with `energy`."""
    ratio = np.maximum(energy * LARGEST_PER_ENERGY / SMALLEST_RELEASE, 1.0 + 1e-6)
    index = RELEASE_INDEX
    mean = SMALLEST_RELEASE * index / (1.0 - index) * (ratio ** (1.0 - index) - 1.0) / (1.0 - ratio**-index)
    return np.where(energy * LARGEST_PER_ENERGY > SMALLEST_RELEASE, mean, 0.0)


def can_release(energy: np.ndarray) -> np.ndarray:
    """Whether a region with `energy` has enough of it for a flare at all."""
    return energy * LARGEST_PER_ENERGY > SMALLEST_RELEASE


def _draw_release(uniform: float, largest: float) -> float:
    top = (SMALLEST_RELEASE / largest) ** RELEASE_INDEX
    return SMALLEST_RELEASE * (1.0 - uniform * (1.0 - top)) ** (-1.0 / RELEASE_INDEX)


class RegionHistory:
    """All active regions of a seed.

    Args:
        seed: A non-negative integer.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self._blocks: dict[int, list[dict]] = {}
        self._regions: dict[int, list[Region]] = {}

    def between(self, start: float, end: float) -> list[Region]:
        """The regions that emerge in [start, end), days since the epoch, in order of time."""
        first, last = math.floor(start / BLOCK_DAYS), math.floor(end / BLOCK_DAYS)
        regions = [region for block in range(first, last + 1) for region in self._block(block)]
        return [region for region in regions if start <= region.emergence < end]

    def alive(self, days: float) -> list[Region]:
        """The regions that exist at a time, anywhere on the Sun."""
        return [region for region in self.between(days - LONGEST_LIFE, days) if days - region.emergence < region.life]

    def _draws(self, block: int) -> list[dict]:
        """Emergences of a block before nesting."""
        if block not in self._blocks:
            random = generator(self.seed, EMERGENCE, block)
            count = random.poisson(float(emergence_rate((block + 0.5) * BLOCK_DAYS)) * BLOCK_DAYS)
            draws = []
            for emergence in np.sort(random.uniform(block, block + 1, count)) * BLOCK_DAYS:
                phase = float(cycle_phase(emergence))
                hemisphere = 1 if random.random() < 0.5 else -1
                latitude = hemisphere * min(max(random.normal(26.0 - 18.0 * phase, 5.0), 2.0), 45.0)
                draws.append(
                    {
                        "emergence": float(emergence),
                        "latitude": float(latitude),
                        "longitude": random.uniform(0.0, 360.0),
                        "nested": random.random() < NESTED_SHARE,
                        "parent": random.random(),
                        "offset": random.normal(0.0, 1.0, 2),
                        "flux": float(np.clip(np.exp(random.normal(math.log(3.0), 1.0)), 0.4, 60.0)),
                        "hale": -1 if random.random() < 0.05 else 1,
                        "tilt": random.normal(0.0, 14.0),
                        "complexity": float(np.exp(random.normal(0.0, 0.7))),
                    }
                )
            self._blocks[block] = draws
        return self._blocks[block]

    def _block(self, block: int) -> list[Region]:
        if block not in self._regions:
            reach = math.ceil(NEST_DAYS / BLOCK_DAYS)
            # only regions that stand alone have children: a chain of nests would reach back without end
            earlier = [d for b in range(block - reach, block + 1) for d in self._draws(b) if not d["nested"]]
            self._regions[block] = [
                self._region(draw, earlier, 10_000 + 60 * block + index)
                for index, draw in enumerate(self._draws(block))
            ]
        return self._regions[block]

    def _region(self, draw: dict, earlier: list[dict], number: int) -> Region:
        latitude, longitude = draw["latitude"], draw["longitude"]
        if draw["nested"]:
            parents = [d for d in earlier if 0.0 < draw["emergence"] - d["emergence"] < NEST_DAYS]
            if parents:
                parent = parents[int(draw["parent"] * len(parents))]
                latitude = parent["latitude"] + 2.5 * draw["offset"][0]
                drift = rotation_offset(parent["latitude"]) * (draw["emergence"] - parent["emergence"])
                longitude = parent["longitude"] + drift + 4.0 * draw["offset"][1]
        hemisphere = 1 if latitude >= 0 else -1
        return Region(
            number=number,
            emergence=draw["emergence"],
            latitude=float(latitude),
            longitude=float(longitude % 360.0),
            flux=draw["flux"],
            leader_sign=hemisphere * draw["hale"] * cycle_parity(draw["emergence"]),
            tilt=math.radians(0.5 * abs(latitude) + draw["tilt"]),
            complexity=draw["complexity"],
            seed=self.seed,
        )


__all__ = [
    "CYCLE_DAYS",
    "SYNODIC_RATE",
    "EnergyHistory",
    "Flare",
    "Region",
    "RegionHistory",
    "cycle_phase",
    "can_release",
    "flare_rate",
    "generator",
    "largest_peak",
    "mean_release",
    "share_above",
]
