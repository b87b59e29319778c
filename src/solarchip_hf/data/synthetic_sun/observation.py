"""From the state of the Sun at one instant to the images of SDO's instruments on their plates."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ...models.modalities import MODALITIES, MODALITY_NAMES
from .corona import PASSBANDS, PROFILE_RADII, Corona
from .ephemeris import Viewpoint
from .loops import draw_loops
from .magnetogram import MagneticSurface, line_of_sight, magnetic_surface
from .state import NOISE, RegionHistory, generator
from .surface import SurfaceNoise

AIA_SCALE_1024 = 2.4  # arcsec a pixel of AIA's synoptic images of 1024 px
HMI_SCALE_4096 = 0.504  # arcsec a pixel of HMI's images of 4096 px
NATIVE_WIDTH = 4096
SATURATION = 16383.0  # DN
READ_NOISE = 1.4  # DN squared
FIELD_STOP = 1450.0  # arcsec from the disk centre, where AIA's corners turn dark
LIMB = 0.985  # beyond this radius the surface is sampled at the limb

# Throughput over that of May 2010 at the middle of 2014 and of 2019: sdoml-lite v9, except 94, 1700 (guesses between
# the others) and 4500 (no table knows it). Real corrections need a real table: this one serves the synthetic Sun alone.
_DEGRADATION_YEARS = np.array([2010.33, 2014.5, 2019.5, 2030.0])
_DEGRADATION = {
    "aia94": (0.95, 0.85),
    "aia131": (0.75, 0.51),
    "aia171": (0.86, 0.74),
    "aia193": (0.91, 0.60),
    "aia211": (0.81, 0.54),
    "aia304": (0.27, 0.06),
    "aia335": (0.45, 0.20),
    "aia1600": (0.62, 0.39),
    "aia1700": (0.90, 0.80),
    "aia4500": (1.0, 1.0),
}
# Limb darkening 1 - a (1 - mu) + b (1 - mu)^2; 1600 and 1700 fitted to images of October 2024, 4500 after Neckel & Labs
# (1994) at 4500 angstrom.
_LIMB_DARKENING = {"aia1600": (0.88, 0.33), "aia1700": (0.95, 0.30), "aia4500": (0.72, -0.05)}
_CONTINUUM = {"aia1600": 52.0, "aia1700": 830.0, "aia4500": 14000.0}  # DN/s at the disk centre in May 2010
# Stray light beyond the limb over the centre's brightness, at 1.0, 1.05, 1.2, 1.3, 1.5, 1.8 R
_STRAY_RADII = np.array([1.0, 1.05, 1.2, 1.3, 1.5, 1.8])
_STRAY = {
    "aia1600": (0.105, 0.072, 0.044, 0.032, 0.014, 0.001),
    "aia1700": (0.11, 0.085, 0.042, 0.030, 0.012, 0.001),
    "aia4500": (0.015, 0.008, 0.004, 0.003, 0.0015, 0.0004),
}


@dataclass(frozen=True)
class Plate:
    """Where the Sun lies on an image.

    Attributes:
        size: Pixels across, N.
        scale: Arcsec a pixel.
        radius: Apparent solar radius in pixels.
        centre: (column, row) of the disk centre, the centre of the first pixel being 0.
        rotation: CROTA2 in degrees: 0 is north up.
    """

    size: int
    scale: float
    radius: float
    centre: tuple[float, float]
    rotation: float = 0.0

    def sky(self) -> tuple[np.ndarray, np.ndarray]:
        """(x, y) of every pixel in solar radii, to west and north, each (N, N)."""
        column = (np.arange(self.size) - self.centre[0]) / self.radius
        row = (np.arange(self.size) - self.centre[1]) / self.radius
        cosine, sine = self._turn()
        return column * cosine - row[:, None] * sine, column * sine + row[:, None] * cosine

    def pixels_of(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(column, row) of points on the sky given in solar radii."""
        cosine, sine = self._turn()
        return (
            (x * cosine + y * sine) * self.radius + self.centre[0],
            (y * cosine - x * sine) * self.radius + self.centre[1],
        )

    def _turn(self) -> tuple[float, float]:
        angle = math.radians(self.rotation)
        return math.cos(angle), math.sin(angle)


def north_up_plate(modality: str, size: int, view: Viewpoint) -> Plate:
    """The plate of an instrument with the Sun at its centre and north up: AIA's 2.4 arcsec a pixel at 1024 px, HMI's
    0.504 at 4096 px, in proportion at other sizes."""
    scale = AIA_SCALE_1024 * 1024 / size if MODALITIES[modality].instrument == "aia" else HMI_SCALE_4096 * 4096 / size
    return Plate(size, scale, view.rsun_arcsec / scale, ((size - 1) / 2, (size - 1) / 2))


def degradation(modality: str, days: float) -> float:
    """Throughput of a channel over that of May 2010; constant beyond 2030 and before 2010."""
    middle, late = _DEGRADATION[modality]
    year = 2010.33 + days / 365.25
    logs = np.log([1.0, middle, late, late**1.25 if late < 1 else 1.0])
    return float(np.exp(np.interp(year, _DEGRADATION_YEARS, logs)))


def exposure_time(modality: str, regions: Iterable, days: float, random: np.random.Generator) -> float:
    """Exposure in seconds: nominal, but 2 to 10 times shorter in the EUV while an M flare or larger is in progress."""
    nominal = MODALITIES[modality].nominal_exposure
    if nominal is None:
        raise ValueError(f"modality: expected a channel of AIA, which has an exposure time, got {modality!r}.")
    exposure = nominal * (1.0 + 3e-4 * random.standard_normal())
    flaring = sum(region.flaring for region in regions if abs(region.longitude.mean()) < 90.0)
    if modality in PASSBANDS and flaring > 1e-5:
        exposure /= float(np.clip(2.0 * (flaring / 1e-5) ** 0.6, 2.0, 10.0))
    return exposure


class Scene:
    """The Sun at one instant, ready to be drawn on any plate.

    Args:
        history: Active regions.
        noise: Random surface fields.
        days: Days since the epoch.
        size: Pixels across the images.
    """

    def __init__(self, history: RegionHistory, noise: SurfaceNoise, days: float, size: int):
        self.days, self.size, self.seed = days, size, history.seed
        self.magnetic: MagneticSurface = magnetic_surface(history, noise, days, size)
        self.view = self.magnetic.view
        self.corona = Corona(self.magnetic, noise, size)

    def random(self, modality: str) -> np.random.Generator:
        """The generator of an image's noise: one for every modality and minute."""
        return generator(self.seed, NOISE, MODALITY_NAMES.index(modality), round(self.days * 1440.0))

    def draw(self, plate: Plate, modalities: Iterable[str]) -> dict[str, tuple[np.ndarray, float | None]]:
        """Draws images on one plate.

        Args:
            plate: Where the Sun lies; shared by the modalities.
            modalities: Names.

        Returns:
            For every name, ((N, N) float32 image in G or DN, exposure in seconds or None for HMI).
        """
        modalities = list(modalities)
        pixels = _Pixels(plate, self.magnetic)
        images: dict[str, tuple[np.ndarray, float | None]] = {}
        if "hmi" in modalities:
            radial = pixels.sample(self.magnetic.radial)
            image = line_of_sight(radial, pixels.mu, pixels.radius < 1.0, plate.size, self.random("hmi"))
            images["hmi"] = (image, None)
        bands = {name: PASSBANDS[name] for name in modalities if name in PASSBANDS}
        intensities = self._euv(plate, pixels, bands) if bands else {}
        for name in modalities:
            if name in _CONTINUUM:
                intensities[name] = self._continuum(name, pixels)
        for name, intensity in intensities.items():
            images[name] = self._expose(name, intensity, plate)
        return {name: images[name] for name in modalities}

    def _euv(self, plate: Plate, pixels: "_Pixels", bands: dict) -> dict[str, np.ndarray]:
        corona = self.corona
        loops = draw_loops(corona.loops, plate, bands)
        holes = pixels.sample(corona.holes)
        outer = pixels.radius > 0.97
        beyond = np.clip((pixels.radius[outer] - 0.97) / 0.03, 0.0, 1.0)
        rays = np.exp(0.3 * np.clip(pixels.radius - 1.0, 0.0, 0.1) / 0.1 * pixels.sample(corona.streamers))
        stop = 1.0 / (1.0 + np.exp(np.clip((pixels.radius * plate.radius * plate.scale - FIELD_STOP) / 25.0, -40, 40)))
        images = {}
        for name, band in bands.items():
            emission = corona.diffuse(band)
            surface = pixels.sample(emission)
            above = pixels.sample(self.magnetic.surface.blur(emission, 6.0), outer)
            surface[outer] += beyond * (above - surface[outer])
            profile = np.interp(pixels.radius, PROFILE_RADII, band.profile)
            # a coronal hole has no bright limb: there is little above it to add up along the line of sight
            profile = np.where(pixels.radius < 1.0, 1.0 + (profile - 1.0) * (1.0 - 0.8 * holes), profile)
            images[name] = (band.quiet * surface * profile * rays + loops[name]) * stop
        return images

    def _continuum(self, name: str, pixels: "_Pixels") -> np.ndarray:
        """1600, 1700 and 4500: limb darkening, plage and network bright, spots dark."""
        corona, magnetic = self.corona, self.magnetic
        linear, quadratic = _LIMB_DARKENING[name]
        slant = 1.0 - pixels.mu
        disk = 1.0 - linear * slant + quadratic * slant**2
        plage = np.tanh(pixels.sample(magnetic.surface.blur(np.abs(magnetic.active), 0.35)) / 90.0)
        spot = pixels.sample(_spot_share(magnetic))
        if name == "aia4500":
            disk = disk * (1.0 + 0.08 * plage * slant) * (1.0 - 0.75 * spot)
        else:
            network = pixels.sample(magnetic.surface.blur(np.abs(magnetic.network), 0.25))
            texture = pixels.sample(corona.fabric("chromosphere"))
            gain, grain, weave = (1.25, 0.025, 0.07) if name == "aia1600" else (0.95, 0.018, 0.055)
            disk = disk * (1.0 + gain * plage + grain * network + weave * texture) * (1.0 - 0.6 * spot)
        stray = np.exp(np.interp(pixels.radius, _STRAY_RADII, np.log(_STRAY[name])))
        # the edge is shared by the pixels it crosses
        inside = np.clip(0.5 + (1.0 - pixels.radius) * pixels.plate_radius, 0.0, 1.0)
        return _CONTINUUM[name] * (disk * inside + stray * (1.0 - inside))

    def _expose(self, name: str, intensity: np.ndarray, plate: Plate) -> tuple[np.ndarray, float]:
        """DN of one exposure, with degradation, noise and saturation; counts of level 1.5 are those of a 0.6" pixel."""
        random = self.random(name)
        exposure = exposure_time(name, self.magnetic.regions, self.days, random)
        counts = intensity * (exposure * degradation(name, self.days))
        averaged = (NATIVE_WIDTH / plate.size) ** 2
        deviation = np.sqrt((np.clip(counts, 0.0, None) + READ_NOISE) / averaged)
        counts = counts + deviation * random.standard_normal(counts.shape, dtype=np.float32)
        return np.minimum(counts, SATURATION).astype(np.float32), exposure


class _Pixels:
    """The pixels of a plate, and where each looks on the surface map."""

    def __init__(self, plate: Plate, magnetic: MagneticSurface):
        x, y = plate.sky()
        self.radius = np.hypot(x, y)
        self.plate_radius = plate.radius
        self.mu = np.sqrt(np.clip(1.0 - self.radius**2, 0.0, 1.0))
        shrink = np.minimum(1.0, LIMB / np.maximum(self.radius, 1e-6))
        x, y = x * shrink, y * shrink
        rows, columns = magnetic.surface.cells_of(np.stack([x, y, np.sqrt(1.0 - x**2 - y**2)]))
        row, column = rows.astype(np.int64), columns.astype(np.int64)
        self._index = row * magnetic.surface.size + column
        self._up, self._right = (rows - row).astype(np.float32), (columns - column).astype(np.float32)

    def sample(self, image: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
        """(N, N) bilinear values of a map, or (K,) of the pixels `where` (N, N) bool."""
        index, up, right = self._index, self._up, self._right
        if where is not None:
            index, up, right = index[where], up[where], right[where]
        flat, width = np.ascontiguousarray(image, np.float32).ravel(), image.shape[1]
        lower = flat[index] * (1.0 - right) + flat[index + 1] * right
        upper = flat[index + width] * (1.0 - right) + flat[index + width + 1] * right
        return lower * (1.0 - up) + upper * up


def _spot_share(magnetic: MagneticSurface) -> np.ndarray:
    """Share of a cell that is dark, from the concentrated field: half at 500 G, less on coarse maps that dilute it."""
    half = 500.0 * min(1.0, (0.25 / magnetic.surface.cell) ** 0.5)
    strong = np.abs(magnetic.compact)
    return 1.0 / (1.0 + np.exp(-np.clip((strong - half) / (0.2 * half), -40.0, 40.0)))
