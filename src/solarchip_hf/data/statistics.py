"""Mean and standard deviation of many images by exact moments that merge."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..models.geometry import SUPPORT_RADIUS, disk_mask
from ..models.modalities import MODALITIES
from ..models.scaling import compress


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of a set of numbers.

    Two sets merge without a loss (Chan, Golub and LeVeque 1983), so that parts of an archive may be counted anywhere
    and in any grouping.

    Attributes:
        count: How many numbers.
        mean: Their mean; 0 for an empty set.
        deviation: Sum of squared deviations from the mean.
    """

    count: int = 0
    mean: float = 0.0
    deviation: float = 0.0

    @classmethod
    def of(cls, values: np.ndarray) -> "Moments":
        """Moments of an array of any shape, in float64; NaN is not allowed.

        Raises:
            ValueError: A value is not finite.
        """
        values = np.asarray(values, dtype=np.float64).ravel()
        if not values.size:
            return cls()
        mean = float(values.mean())
        deviation = float(np.square(values - mean).sum())
        if not math.isfinite(deviation):
            raise ValueError("values: expected finite numbers, got NaN or infinity; select the valid ones first.")
        return cls(int(values.size), mean, deviation)

    def __add__(self, other: "Moments") -> "Moments":
        if not isinstance(other, Moments):
            return NotImplemented
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        deviation = self.deviation + other.deviation + delta * delta * (self.count * (other.count / count))
        return Moments(count, mean, deviation)

    @property
    def std(self) -> float:
        """Standard deviation of the numbers themselves (divided by N); NaN for an empty set."""
        return math.sqrt(self.deviation / self.count) if self.count else math.nan

    def to_dict(self) -> dict[str, float]:
        """Plain values, exact through JSON (Python writes the shortest text that reads back equal)."""
        return {"count": self.count, "mean": self.mean, "deviation": self.deviation}


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Moments of the union of many sets, the same to the last bit in whatever order they come.

    Args:
        parts: Moments, as one an image.

    Returns:
        The sum; pooled with exactly rounded sums (`math.fsum`), where `+` rounds at every step.
    """
    parts = [part for part in parts if part.count]
    if not parts:
        return Moments()
    count = sum(part.count for part in parts)
    mean = math.fsum(part.count * part.mean for part in parts) / count
    within = math.fsum(part.deviation for part in parts)
    between = math.fsum(part.count * (part.mean - mean) ** 2 for part in parts)
    return Moments(count, mean, within + between)


def support_mask(modality: str, size: int, geometry: str = "rsun") -> np.ndarray:
    """Pixels that statistics are taken over: the disk for HMI, the inscribed circle for AIA.

    Args:
        modality: Name from `MODALITIES`.
        size: Pixels on a side.
        geometry: Of the canonical grid; `"none"` has no known disk, and every pixel counts. On `"arcsec"` the solar
            radius varies over the year, and HMI's missing pixels off the disk bound its support by themselves.

    Returns:
        (size, size) bool.
    """
    if geometry == "none":
        return np.ones((size, size), dtype=bool)
    on_disk = MODALITIES[modality].instrument == "hmi" and geometry == "rsun"
    return disk_mask(size, 1.0 if on_disk else SUPPORT_RADIUS)


def image_moments(physical: np.ndarray, modality: str, *, geometry: str = "rsun", scaling: str = "log1p") -> Moments:
    """Moments of one transformed image over its valid pixels inside the modality's support.

    Args:
        physical: (N, N) canonical image in physical units, NaN where invalid.
        modality: Name from `MODALITIES`.
        geometry: Geometry of the grid.
        scaling: The transform before the z-score, as `"log1p"`.

    Returns:
        The moments of the transformed values.
    """
    physical = np.asarray(physical, dtype=np.float32)
    inside = physical[support_mask(modality, physical.shape[-1], geometry)]
    return Moments.of(compress(inside[np.isfinite(inside)], scaling))


__all__ = ["Moments", "image_moments", "merge_moments", "support_mask"]
