"""An equal-area map of the visible hemisphere, and smooth random fields that rotate with the Sun.

The map is Lambert's azimuthal equal-area projection about the disk centre, reaching a little beyond the limb. It has
no poles and no seam, one cell is the same number of square centimetres everywhere, and a Gaussian blur on it distorts
by at most 1.4 at the limb, where foreshortening hides it. (A latitude-longitude grid smears features along meridians
towards the visible pole.)
"""

import functools
import math

import numpy as np
from scipy.ndimage import gaussian_filter

from .ephemeris import Viewpoint
from .state import SURFACE, generator

CENTIMETRES_PER_DEGREE = 6.96e10 * math.pi / 180.0  # on the surface
REACH = 2.0 * math.sin(math.radians(50.0))  # the map ends 100 degrees from the disk centre
LATTICE_POINTS = 160_000  # one point in 0.26 square degrees


class SurfaceMap:
    """Geometry of the map.

    Args:
        degrees_per_cell: Cell size at the disk centre.
    """

    def __init__(self, degrees_per_cell: float):
        cells = math.ceil(2.0 * REACH / math.radians(degrees_per_cell) / 16.0) * 16  # blocks of 2 to 16 fit
        self.size = cells
        self.cell = degrees_per_cell
        self.cell_area = (degrees_per_cell * CENTIMETRES_PER_DEGREE) ** 2  # cm2
        self._per_radius = 1.0 / math.radians(degrees_per_cell)
        axis = (np.arange(cells) - (cells - 1) / 2.0) / self._per_radius
        x, y = np.meshgrid(axis, axis)
        squared = np.minimum(x**2 + y**2, 3.9)
        shrink = np.sqrt(1.0 - squared / 4.0)
        self._vectors = np.stack([x * shrink, y * shrink, 1.0 - squared / 2.0])

    def cells_of(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, column), fractional, of unit vectors (3, ...) in the observer's frame."""
        stretch = np.sqrt(2.0 / np.maximum(1.0 + vectors[2], 1e-3)) * self._per_radius
        centre = (self.size - 1) / 2.0
        return vectors[1] * stretch + centre, vectors[0] * stretch + centre

    def sine_latitude(self, b0: float) -> np.ndarray:
        """(size, size) sine of heliographic latitude."""
        tilt = math.radians(b0)
        return self._vectors[1] * math.cos(tilt) + self._vectors[2] * math.sin(tilt)

    def scatter(self, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Adds weighted points to an empty map, sharing each among its four cells; points outside are dropped."""
        row, column = np.floor(rows).astype(np.int64), np.floor(columns).astype(np.int64)
        inside = (row >= 0) & (row < self.size - 1) & (column >= 0) & (column < self.size - 1)
        row, column, weights = row[inside], column[inside], weights[inside]
        down, right = rows[inside] - row, columns[inside] - column
        total = np.zeros(self.size * self.size)
        for step_row, share_row in ((0, 1.0 - down), (1, down)):
            for step_column, share_column in ((0, 1.0 - right), (1, right)):
                index = (row + step_row) * self.size + column + step_column
                total += np.bincount(index, weights * share_row * share_column, self.size * self.size)
        return total.reshape(self.size, self.size)

    def blur(self, image: np.ndarray, degrees: float) -> np.ndarray:
        """Gaussian blur by `degrees` (standard deviation); wide ones on a coarser map, for speed."""
        sigma = degrees / self.cell
        factor = 1
        while factor < 16 and sigma / (2 * factor) >= 1.5:
            factor *= 2
        if factor == 1:
            return gaussian_filter(image.astype(np.float32), sigma, truncate=3.0)
        coarse = self.size // factor
        blocks = image.reshape(coarse, factor, coarse, factor).mean((1, 3), dtype=np.float32)
        return _enlarge(gaussian_filter(blocks, sigma / factor, truncate=3.0), factor)


def _enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """Bilinear enlargement of block means by a whole factor."""
    size = image.shape[0]
    position = np.clip((np.arange(size * factor) + 0.5) / factor - 0.5, 0, size - 1)
    lower = np.minimum(position.astype(np.int64), size - 2)
    upper_share = (position - lower).astype(np.float32)
    rows = image[lower] * (1 - upper_share)[:, None] + image[lower + 1] * upper_share[:, None]
    return rows[:, lower] * (1 - upper_share) + rows[:, lower + 1] * upper_share


@functools.lru_cache(maxsize=1)
def _lattice() -> np.ndarray:
    """(3, points) unit vectors of a Fibonacci lattice in the Carrington frame, z to the north pole."""
    index = np.arange(LATTICE_POINTS) + 0.5
    z = 1.0 - 2.0 * index / LATTICE_POINTS
    angle = math.pi * (1.0 + math.sqrt(5.0)) * index
    radius = np.sqrt(1.0 - z**2)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z]).astype(np.float32)


class SurfaceNoise:
    """Smooth Gaussian random fields on the Sun, of unit variance, that rotate with it and renew themselves.

    White noise lives on a lattice of points fixed in Carrington coordinates. An epoch of T days has its own numbers,
    and between two epochs they blend by cosine and sine, which keeps the variance. The points in view are dropped on
    the map and blurred there, so a field is the same Sun at every image size.

    Args:
        seed: Seed of the Sun.
    """

    FIELDS = (
        *("lanes", "polarity", "strength", "mottle"),
        *("filaments", "structure", "streamers", "cool", "warm", "chromosphere"),
    )

    def __init__(self, seed: int):
        self.seed = seed
        self._epochs: dict[tuple[str, int], np.ndarray] = {}

    def view(self, surface: SurfaceMap, view: Viewpoint) -> tuple[np.ndarray, np.ndarray]:
        """(indices of the lattice points in view, their flat cells on the map)."""
        lattice = _lattice()
        turn, tilt = math.radians(view.l0), math.radians(view.b0)
        towards = lattice[0] * math.cos(turn) + lattice[1] * math.sin(turn)
        visible = np.flatnonzero(lattice[2] * math.sin(tilt) + towards * math.cos(tilt) > -0.17)
        x, y, z = lattice[:, visible]
        towards = towards[visible]
        vectors = np.stack(
            [
                y * math.cos(turn) - x * math.sin(turn),
                z * math.cos(tilt) - towards * math.sin(tilt),
                z * math.sin(tilt) + towards * math.cos(tilt),
            ]
        )
        rows, columns = surface.cells_of(vectors)
        cells = np.rint(rows).astype(np.int64) * surface.size + np.rint(columns).astype(np.int64)
        return visible, cells

    def field(
        self,
        name: str,
        surface: SurfaceMap,
        points: tuple[np.ndarray, np.ndarray],
        days: float,
        *,
        lifetime: float,
        degrees: float,
    ) -> np.ndarray:
        """One field on the map.

        Args:
            name: One of `FIELDS`.
            surface: The map.
            points: What `view` returned for it.
            days: Days since the epoch.
            lifetime: Days between two independent epochs.
            degrees: Standard deviation of the blur.

        Returns:
            (size, size) float32, mean 0, variance about 1.
        """
        epoch = math.floor(days / lifetime)
        angle = (days / lifetime - epoch) * math.pi / 2.0
        visible, cells = points
        amplitudes = math.cos(angle) * self._epoch(name, epoch)[visible]
        amplitudes += math.sin(angle) * self._epoch(name, epoch + 1)[visible]
        white = np.bincount(cells, amplitudes, surface.size**2).reshape(surface.size, surface.size)
        # variance of a blurred white field: points per cell over the area of the squared kernel
        points_per_cell = LATTICE_POINTS * math.radians(surface.cell) ** 2 / (4.0 * math.pi)
        sigma = degrees / surface.cell
        return surface.blur(white, degrees) / math.sqrt(points_per_cell / (4.0 * math.pi * sigma**2))

    def _epoch(self, name: str, epoch: int) -> np.ndarray:
        key = (name, epoch)
        if key in self._epochs:
            self._epochs[key] = self._epochs.pop(key)  # the last used comes last
        else:
            if len(self._epochs) >= 4 * len(self.FIELDS):
                self._epochs.pop(next(iter(self._epochs)))
            random = generator(self.seed, SURFACE, self.FIELDS.index(name), epoch)
            self._epochs[key] = random.standard_normal(LATTICE_POINTS, dtype=np.float32)
        return self._epochs[key]


__all__ = ["CENTIMETRES_PER_DEGREE", "SurfaceMap", "SurfaceNoise"]
