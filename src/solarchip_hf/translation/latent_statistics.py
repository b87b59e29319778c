"""What is measured of stored latents: the moments of their channels, and what decoding them loses.

Files are read in slices: beyond one block of `_BLOCK` numbers, or a batch of images, nothing is held.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ..data.observations import Observations
from ..models.modalities import MODALITIES
from ..models.modeling_solarchip import SolarChipForPreTraining

logger = logging.getLogger(__name__)

_BLOCK = 2**22  # numbers of a slice, 32 MiB in float64; never less than one image's latent
# A channel that hardly varies carries nothing; dividing by its deviation would blow up rounding.
_DEAD_CHANNEL = 1e-5


def shard_moments(path: Path, marked: np.ndarray) -> torch.Tensor:
    """Sums over the marked and observed latents of a shard.

    Args:
        path: The shard of n observations.
        marked: (n,) bool.

    Returns:
        (3, M, z) float64: of every modality and channel the sum, the sum of squares, and the number of pixels.
    """
    with safe_open(path, framework="pt") as file:
        stored, observed = file.get_slice("latents"), file.get_tensor("observed")
        rows, modalities, channels, height, width = stored.get_shape()
        used = observed & torch.from_numpy(marked)[:, None]  # (n, M)
        moments = torch.zeros(3, modalities, channels, dtype=torch.float64)
        step = max(1, _BLOCK // (channels * height * width))
        for position in range(modalities):
            for start in range(0, rows, step):
                marks = used[start : start + step, position]
                if not marks.any():
                    continue
                block = stored[start : start + step, position][marks].double()  # (k, z, h, w)
                moments[0, position] += block.sum((0, 2, 3))
                moments[1, position] += block.square_().sum((0, 2, 3))
        moments[2] = used.sum(0)[:, None] * (height * width)
    return moments


def channel_statistics(
    moments: torch.Tensor, modalities: Sequence[str]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Mean and deviation of each latent channel.

    Args:
        moments: (3, M, z) float64, summed over the shards.
        modalities: The M channels.

    Returns:
        Means and deviations by modality; a channel that hardly varies is given the deviation 1.

    Raises:
        ValueError: A modality was never counted.
    """
    sums, squares, counts = moments  # (M, z) each
    missing = [name for name, count in zip(modalities, counts[:, 0].tolist(), strict=True) if not count]
    if missing:
        raise ValueError(f"observations: expected training images of every modality, got none of {', '.join(missing)}.")
    mean = sums / counts
    std = (squares / counts - mean.square()).clamp(min=0).sqrt()
    dead = std < _DEAD_CHANNEL
    if dead.any():
        logger.warning("%d latent channels hardly vary; they are centred but not scaled.", int(dead.sum()))
        std[dead] = 1.0
    by_modality = [dict(zip(modalities, table.tolist(), strict=True)) for table in (mean, std)]
    return by_modality[0], by_modality[1]


@dataclass
class Errors:
    """Sums over the valid pixels of some images of one modality."""

    absolute: float = 0.0
    squared: float = 0.0
    pixels: int = 0
    correlation: float = 0.0
    images: int = 0

    def __add__(self, other: "Errors") -> "Errors":
        return Errors(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@torch.no_grad()
def reconstruction_errors(
    model: SolarChipForPreTraining, stored: Mapping[int, tuple[Path, int]], observations: Observations, position: int
) -> Errors:
    """What decoding some stored latents of one modality loses, in physical units inside the modality's support.

    Args:
        model: The autoencoder.
        stored: For each observation the shard with its latent, and the row therein; decoded as one batch.
        observations: The images.
        position: The modality's place.

    Returns:
        The sums.
    """
    name, total, latents = observations.modalities[position], Errors(), []
    for path, row in stored.values():
        with safe_open(path, framework="pt") as file:
            latents.append(file.get_slice("latents")[row, position])
    decoded = model.decode(torch.stack(latents).float().to(model.device), [position] * len(latents))
    for row, image in zip(stored, observations.processor.unscale(decoded[:, 0], name), strict=True):
        truth = np.asarray(observations.physical(row)[name], dtype=np.float64)
        valid = np.isfinite(truth) & np.isfinite(image)
        error = image[valid].astype(np.float64) - truth[valid]
        correlation = float(np.corrcoef(image[valid], truth[valid])[0, 1])
        total += Errors(float(np.abs(error).sum()), float(np.square(error).sum()), error.size, correlation, 1)
    return total


def error_table(errors: Errors, modality: str, statistics: Mapping[str, Any] | None) -> dict[str, Any]:
    """The means of `reconstruction_errors`, with the unit of the processor's statistics."""
    unit = (statistics or {}).get("modalities", {}).get(modality, {}).get("unit", MODALITIES[modality].unit)
    return {
        "mae": errors.absolute / errors.pixels,
        "rmse": (errors.squared / errors.pixels) ** 0.5,
        "correlation": errors.correlation / errors.images,
        "unit": unit,
        "images": errors.images,
    }


__all__ = ["Errors", "channel_statistics", "error_table", "reconstruction_errors", "shard_moments"]
