"""How far reconstructions are off in physical units: gauss for the magnetogram, DN for a passband."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..models.geometry import disk_mask
from ..models.photometry import physical_unit

# Smallest apparent radius of the year relative to the 976 arcsec of the canonical disk (944 arcsec, in July).
SMALLEST_ARCSEC_RADIUS = 0.967

_EXPANSIONS = {
    "log1p": lambda values: torch.expm1(values.abs()).copysign(values),
    "asinh": torch.sinh,
    "linear": torch.clone,
}


class PhysicalError:
    """Mean absolute error of reconstructions on the solar disk, in the unit of each modality.

    The z-score and the transform are undone on both images, on their device. Pixels are those within the limb; on a
    fixed plate scale those that are within it all year round; without a geometry all.

    Args:
        processor: An image processor with statistics, or anything else: then there are no figures.
        modalities: The M names in the model's order.
    """

    def __init__(self, processor: Any, modalities: Sequence[str]):
        self.modalities = list(modalities)
        self.rows: list[tuple[float, float]] = []
        table = (getattr(processor, "statistics", None) or {}).get("modalities", {})
        if not hasattr(processor, "photometry") or any(name not in table for name in self.modalities):
            return
        self.size, self.geometry = processor.size, processor.geometry
        self.expand = _EXPANSIONS[processor.scaling]
        self.rows = [(float(table[name]["mean"]), float(table[name]["std"])) for name in self.modalities]
        units = [physical_unit(name, processor.photometry).replace("/", "_per_") for name in self.modalities]
        self.names = [f"reconstruction_mae_{name}_{unit}" for name, unit in zip(self.modalities, units, strict=True)]

    def known_at(self, size: int) -> bool:
        """Whether there are figures for images of that many pixels on a side."""
        return bool(self.rows) and size == self.size

    def __call__(
        self, reconstruction: torch.Tensor, pixel_values: torch.Tensor, observed: torch.Tensor
    ) -> torch.Tensor:
        """The error of each image.

        Args:
            reconstruction: (B, M, N, N) scaled.
            pixel_values: (B, M, N, N) scaled; what a missing image holds is not read.
            observed: (B, M) bool.

        Returns:
            (B, M) float32 mean absolute errors in physical units, NaN where not observed.
        """
        inside = self._inside(pixel_values.device)
        errors = torch.full(observed.shape, torch.nan, device=pixel_values.device)
        for index, (mean, std) in enumerate(self.rows):  # one modality at a time bounds the temporaries
            seen = observed[:, index]
            ours, true = (
                self.expand(images[seen, index][..., inside].float() * std + mean)
                for images in (reconstruction, pixel_values)
            )  # (n, pixels)
            errors[seen, index] = (ours - true).abs().mean(-1)
        return errors

    def _inside(self, device: torch.device) -> torch.Tensor:
        if self.geometry == "none":
            return torch.ones(self.size, self.size, dtype=torch.bool, device=device)
        radius = SMALLEST_ARCSEC_RADIUS if self.geometry == "arcsec" else 1.0
        return torch.from_numpy(disk_mask(self.size, radius)).to(device)

    def metrics(self, errors: torch.Tensor) -> Mapping[str, float]:
        """Means over observations.

        Args:
            errors: (N, M) of all held-out observations.

        Returns:
            `reconstruction_mae_{modality}_{unit}`, as `reconstruction_mae_hmi_G`; nothing for a modality without any
            image.
        """
        means = errors.nanmean(0).tolist()
        seen = (~errors.isnan()).any(0).tolist()
        return {name: mean for name, mean, any_seen in zip(self.names, means, seen, strict=True) if any_seen}


__all__ = ["PhysicalError"]
