"""Where on the Sun a flare forecast comes from: integrated gradients from the same Sun without its active regions.

The path begins at an image in which every pixel is the median of its ring about the disk's centre: what the channel
would show had the Sun no structure, a field of about zero in a magnetogram and a smooth, limb-brightened disk in the
extreme ultraviolet. The attributions of all pixels add up to the difference that the structure makes (completeness:
Sundararajan, Taly and Yan 2017, arXiv 1703.01365), in units of the log-odds that the forecast is about.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy import ndimage

from solarchip_hf.models.calibration import exceedance_logits
from solarchip_hf.models.geometry import canonical_header
from solarchip_hf.models.headers import SolarImage
from solarchip_hf.models.modalities import resolve_modality

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNIT = "log-odds a pixel"


@dataclass(frozen=True, eq=False)
class FlareAttribution:
    """What every pixel adds to the log-odds of a flare.

    Attributes:
        target: Name of the event, as `"m_plus"`.
        maps: For every observed channel, (N, N) float32 on the canonical grid, row 0 in the south: positive where the
            structure of the image speaks for a flare, negative where against.
        images: For every observed channel, (N, N) float32 in physical units, on the same grid, NaN where cut off.
        headers: Facts of the images, with the WCS of the grid.
        log_odds: Log-odds of the event that the network gives, before calibration.
        baseline_log_odds: The same without any structure in the images.
    """

    target: str
    maps: Mapping[str, np.ndarray]
    images: Mapping[str, np.ndarray] = field(repr=False)
    headers: Mapping[str, SolarImage] = field(repr=False)
    log_odds: float
    baseline_log_odds: float

    @property
    def residual(self) -> float:
        """What the maps' sum misses of the difference of the two log-odds: the error of the integration."""
        total = sum(float(values.sum(dtype=np.float64)) for values in self.maps.values())
        return self.log_odds - self.baseline_log_odds - total

    def smoothed(self, modality: str | int, pixels: float) -> np.ndarray:
        """A map blurred by a Gaussian of so many pixels, which keeps its sum but for what leaves the frame.

        Args:
            modality: One of `maps`.
            pixels: Standard deviation.

        Returns:
            (N, N) float32.
        """
        return ndimage.gaussian_filter(self.maps[resolve_modality(modality)], pixels, mode="constant")

    def peaks(self, modality: str | int, count: int = 3) -> list[dict[str, float]]:
        """The places that speak most for a flare.

        Args:
            modality: One of `maps`.
            count: How many, at most; none nearer than a tenth of the frame to a stronger one.

        Returns:
            For each, helioprojective `tx` and `ty` in arcsec, and `log_odds`, the sum within a twentieth of the frame.
        """
        name = resolve_modality(modality)
        size = len(self.maps[name])
        near = max(1, round(size / 20))
        grid = np.hypot(*np.mgrid[-near : near + 1, -near : near + 1]) <= near
        total = ndimage.convolve(self.maps[name].astype(float), grid.astype(float), mode="constant")
        rows, columns = np.indices(total.shape)
        facts = self.headers[name]
        found: list[dict[str, float]] = []
        while len(found) < count and total.max() > 0:
            row, column = np.unravel_index(int(total.argmax()), total.shape)
            offset = np.array([column + 1 - facts.crpix[0], row + 1 - facts.crpix[1]]) * facts.cdelt
            tx, ty = np.array(facts.rotation) @ offset + facts.crval
            found.append({"tx": float(tx), "ty": float(ty), "log_odds": float(total[row, column])})
            total[np.hypot(rows - row, columns - column) <= size / 10] = -np.inf
        return found

    def to_map(self, modality: str | int) -> Any:
        """A map of attribution as a sunpy Map with the WCS of its image, to be saved or drawn over any other Map.

        Args:
            modality: One of `maps`.

        Returns:
            A `GenericMap`; draw it on another Map's axes with `autoalign=True`.

        Raises:
            ImportError: sunpy is not installed.
        """
        try:
            from sunpy.map import Map
        except ImportError as error:
            raise ImportError("Maps need sunpy: pip install 'solarchip_hf[sunpy]'.") from error
        name = resolve_modality(modality)
        header = canonical_header(self.headers[name], name, "", None)
        # no longer what the instrument measured: sunpy would take it for a magnetogram or an image in DN
        header = {key: value for key, value in header.items() if key.upper() not in ("INSTRUME", "TELESCOP", "BUNIT")}
        header["CONTENT"] = f"{self.target.upper()} ATTRIBUTION FROM {name.upper()}"
        return Map(self.maps[name], header)

    def overlay(self, modality: str | int | None = None, path: str | Path | None = None) -> "Figure":
        """The image in its own colour map with the attribution laid over it.

        Args:
            modality: One of `maps`; the first by default.
            path: Where to save the figure; not saved if None.

        Returns:
            The figure.
        """
        from .flare_figures import attribution_figure

        return attribution_figure(self, modality, path)


def structureless(pixel_values: torch.Tensor) -> torch.Tensor:
    """Images in which every pixel is the median of its ring, a pixel wide, about the centre of the frame.

    Args:
        pixel_values: (..., N, N) scaled images on the canonical grid.

    Returns:
        A tensor like it.
    """
    size = pixel_values.shape[-1]
    offset = np.arange(size) - (size - 1) / 2
    rings = np.hypot(offset[:, None], offset[None, :]).astype(int)
    images = pixel_values.detach().float().cpu().reshape(-1, size, size).numpy()
    medians = [np.asarray(ndimage.median(image, rings, np.arange(rings.max() + 1)))[rings] for image in images]
    return torch.from_numpy(np.stack(medians)).to(pixel_values).reshape(pixel_values.shape)


@torch.enable_grad()
def integrated_gradients(
    model: torch.nn.Module,
    pixel_values: torch.Tensor,
    observed: torch.Tensor,
    boundary: int,
    *,
    baseline: torch.Tensor | None = None,
    steps: int = 32,
    batch_size: int = 8,
) -> tuple[torch.Tensor, float, float]:
    """Integrated gradients of the log-odds of reaching a class, for one observation.

    The integral over the straight path is taken by Gauss-Legendre quadrature. The model should be in `eval` mode; its
    parameters gather no gradient.

    Args:
        model: A `SolarChipForImageClassification`.
        pixel_values: (1, M, N, N) scaled images.
        observed: (1, M) bool.
        boundary: Of the classes: 0 between the first and the second, and so on.
        baseline: (1, M, N, N) where the path begins; `structureless(pixel_values)` by default.
        steps: Points along the path.
        batch_size: Points a forward pass.

    Returns:
        (M, N, N) float32 attributions, zero where not observed; the log-odds at the end and at the start of the path.
    """
    baseline = structureless(pixel_values) if baseline is None else baseline
    difference = pixel_values - baseline
    nodes, weights = np.polynomial.legendre.leggauss(steps)

    def score(images: torch.Tensor) -> torch.Tensor:
        logits = model(pixel_values=images, observed=observed.expand(len(images), -1)).logits
        return exceedance_logits(logits)[:, boundary]

    gradient = torch.zeros_like(pixel_values[0], dtype=torch.float32)
    for start in range(0, steps, batch_size):
        chosen = slice(start, start + batch_size)
        position = torch.as_tensor((nodes[chosen] + 1) / 2).to(pixel_values)
        weight = torch.as_tensor(weights[chosen] / 2).to(gradient)
        points = (baseline + position[:, None, None, None] * difference).detach().requires_grad_()
        (slope,) = torch.autograd.grad(score(points).sum(), points)
        gradient += (weight[:, None, None, None] * slope).sum(0)
    with torch.no_grad():
        ends = score(torch.cat([pixel_values, baseline]))
    attribution = torch.where(observed[0][:, None, None], gradient * difference[0].float(), 0.0)
    return attribution, float(ends[0]), float(ends[1])


__all__ = ["FlareAttribution", "integrated_gradients", "structureless"]
