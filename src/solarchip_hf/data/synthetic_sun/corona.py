"""Extreme-ultraviolet emission of the diffuse corona: quiet Sun, coronal holes, filaments.

Intensities are DN a second in a pixel of 0.6 arcsec, before degradation, as AIA's level 1.5 counts them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .loops import LoopPoints, coronal_loops
from .magnetogram import MagneticSurface
from .surface import SurfaceNoise

# Radii (in R) of the passbands' profiles: the median of AIA synoptic images of 4 October 2024 in rings, over that at
# 0.7 R, smoothed, with that day's active regions taken out on the disk.
PROFILE_RADII = np.array([0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 1.0, 1.01, 1.02, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.5, 1.8])


@dataclass(frozen=True, eq=False, kw_only=True)
class Passband:
    """What one EUV channel sees.

    Attributes:
        quiet: Median of the quiet disk, DN/s.
        loop: Scale of the loops, DN/s.
        blur: Degrees over which the diffuse emission follows the field.
        exponent: Of the diffuse emission in the mean unsigned field.
        hole: Brightness inside a coronal hole over that outside.
        filament: Darkening at filaments.
        fabric: Which small-scale random field it shows.
        texture: Weight of that field.
        profile: Radial factor at `PROFILE_RADII`.
        response: (log10 T, width, weight) of the peaks of the temperature response (Lemen et al. 2012, fig. 8).
    """

    quiet: float
    loop: float
    blur: float
    exponent: float
    hole: float
    filament: float
    fabric: str
    texture: float
    profile: tuple[float, ...]
    response: tuple[tuple[float, float, float], ...]

    def responds(self, log_temperature: np.ndarray) -> np.ndarray:
        """Relative response at log10 T, of the same shape."""
        peaks = [w * np.exp(-0.5 * ((log_temperature - centre) / width) ** 2) for centre, width, w in self.response]
        return np.sum(peaks, axis=0)


_COOL = (1.0, 1.03, 1.1, 1.3, 1.5, 1.85, 2.5, 3.0, 2.35, 0.95, 0.34, 0.18, 0.12, 0.07, 0.045, 0.02, 0.0)
_WARM = (1.0, 1.02, 1.06, 1.15, 1.3, 1.55, 2.0, 2.7, 2.6, 1.4, 0.6, 0.3, 0.18, 0.09, 0.055, 0.025, 0.0)
_HOT = (1.0, 1.02, 1.05, 1.12, 1.25, 1.45, 1.75, 2.1, 2.1, 1.45, 0.72, 0.40, 0.24, 0.12, 0.07, 0.027, 0.0)
_CHROMOSPHERE = (1.0, 1.0, 1.02, 1.05, 1.08, 1.12, 1.15, 1.05, 0.6, 0.28, 0.13, 0.08, 0.05, 0.025, 0.01, 0.0, 0.0)

PASSBANDS: Mapping[str, Passband] = {
    "aia94": Passband(
        quiet=0.55,
        loop=3.0,
        blur=3.0,
        exponent=0.8,
        hole=0.8,
        filament=0.0,
        fabric="warm",
        texture=0.09,
        profile=_HOT,
        response=((6.85, 0.13, 1.0), (6.05, 0.15, 0.10)),
    ),
    "aia131": Passband(
        quiet=3.3,
        loop=55.0,
        blur=1.6,
        exponent=0.75,
        hole=0.8,
        filament=0.2,
        fabric="cool",
        texture=0.14,
        profile=_COOL,
        response=((5.70, 0.15, 1.0), (7.05, 0.13, 0.8)),
    ),
    "aia171": Passband(
        quiet=95.0,
        loop=1700.0,
        blur=1.6,
        exponent=0.75,
        hole=0.7,
        filament=0.3,
        fabric="cool",
        texture=0.14,
        profile=_COOL,
        response=((5.85, 0.14, 1.0),),
    ),
    "aia193": Passband(
        quiet=115.0,
        loop=700.0,
        blur=3.0,
        exponent=0.9,
        hole=0.35,
        filament=0.3,
        fabric="warm",
        texture=0.1,
        profile=_WARM,
        response=((6.18, 0.14, 1.0), (7.25, 0.10, 0.15)),
    ),
    "aia211": Passband(
        quiet=36.0,
        loop=140.0,
        blur=3.0,
        exponent=1.0,
        hole=0.30,
        filament=0.3,
        fabric="warm",
        texture=0.1,
        profile=_HOT,
        response=((6.28, 0.14, 1.0),),
    ),
    "aia304": Passband(
        quiet=20.0,
        loop=160.0,
        blur=0.8,
        exponent=0.75,
        hole=0.95,
        filament=0.5,
        fabric="chromosphere",
        texture=0.18,
        profile=_CHROMOSPHERE,
        response=((4.9, 0.25, 1.0),),
    ),
    "aia335": Passband(
        quiet=1.6,
        loop=7.0,
        blur=3.0,
        exponent=1.0,
        hole=0.45,
        filament=0.0,
        fabric="warm",
        texture=0.08,
        profile=_HOT,
        response=((6.42, 0.18, 1.0), (5.4, 0.2, 0.1)),
    ),
}


class Corona:
    """The corona above one magnetic surface; each part is computed when first asked for.

    Args:
        magnetic: The field of the visible hemisphere.
        noise: The random fields.
        size: Pixels across the image.
    """

    def __init__(self, magnetic: MagneticSurface, noise: SurfaceNoise, size: int):
        self.magnetic, self.size, self._noise = magnetic, size, noise
        self._unsigned_blurs: dict[float, np.ndarray] = {}
        self._fabrics: dict[str, np.ndarray] = {}

    @cached_property
    def plage(self) -> np.ndarray:
        """(map) unsigned field of active regions, blurred a little, G."""
        return self.magnetic.surface.blur(np.abs(self.magnetic.active), 0.8)

    @cached_property
    def structure(self) -> np.ndarray:
        """(map) large-scale unevenness of the corona that the field underfoot does not tell."""
        return np.exp(0.12 * self._field("structure", lifetime=5.0, degrees=5.0))

    def fabric(self, name: str) -> np.ndarray:
        """(map) small-scale random field of the `cool` or `warm` corona or of the `chromosphere`."""
        if name not in self._fabrics:
            degrees, lifetime = {"cool": (0.9, 0.5), "warm": (1.3, 1.0), "chromosphere": (0.7, 1.0)}[name]
            self._fabrics[name] = self._field(name, lifetime=lifetime, degrees=degrees)
        return self._fabrics[name]

    @cached_property
    def streamers(self) -> np.ndarray:
        """(map) random field that makes the corona beyond the limb uneven."""
        return self._field("streamers", lifetime=6.0, degrees=4.0)

    @cached_property
    def loops(self) -> LoopPoints | None:
        """Points along the loops."""
        return coronal_loops(self.magnetic, self.size)

    @cached_property
    def holes(self) -> np.ndarray:
        """(map) 0 to 1: open field, where the mean over 9 degrees is unipolar, away from plage."""
        surface = self.magnetic.surface
        unipolar = 1.0 / (1.0 + np.exp(-(np.abs(surface.blur(self.magnetic.radial, 9.0)) - 1.6) / 0.35))
        return surface.blur(unipolar * np.exp(-self.plage / 25.0), 2.0)

    @cached_property
    def filaments(self) -> np.ndarray:
        """(map) 0 to 1: inversion lines of the weak field, here and there, outside active regions."""
        surface = self.magnetic.surface
        mean = surface.blur(self.magnetic.radial, 3.0)
        gradient = np.hypot(*np.gradient(mean, surface.cell))
        chosen = self._field("filaments", lifetime=9.0, degrees=3.0) > 0.6
        share = np.exp(-(mean**2)) * (1.0 - np.exp(-((gradient / 0.5) ** 2))) * np.exp(-self.plage / 60.0)
        return np.clip(2.5 * surface.blur(share * chosen, 0.8), 0.0, 1.0)

    def diffuse(self, passband: Passband) -> np.ndarray:
        """(map) diffuse emission over that of the quiet Sun."""
        heating = (0.5 * self._unsigned(passband.blur) + 0.6 * self._unsigned(9.0) + 0.6) / 3.3
        heating = heating / (1.0 + heating / 60.0)  # plage is covered by moss and loops, not by ever brighter gas
        emission = heating**passband.exponent * np.exp(passband.texture * self.fabric(passband.fabric))
        if passband.fabric != "chromosphere":
            emission *= self.structure
        return emission * (1.0 - (1.0 - passband.hole) * self.holes) * (1.0 - passband.filament * self.filaments)

    def _unsigned(self, degrees: float) -> np.ndarray:
        if degrees not in self._unsigned_blurs:
            unsigned = np.abs(self.magnetic.active + self.magnetic.network)
            self._unsigned_blurs[degrees] = self.magnetic.surface.blur(unsigned, degrees)
        return self._unsigned_blurs[degrees]

    def _field(self, name: str, *, lifetime: float, degrees: float) -> np.ndarray:
        magnetic = self.magnetic
        return self._noise.field(
            name, magnetic.surface, magnetic.points, magnetic.days, lifetime=lifetime, degrees=degrees
        )
