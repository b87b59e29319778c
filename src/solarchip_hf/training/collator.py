"""Stacks observations to a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch


class SolarChipDataCollator:
    """Stacks observations, each with all modalities in the model's order, to a batch.

    Args:
        modalities: Names in the order of the observations' first axis, to check their number and for messages.
    """

    def __init__(self, modalities: Sequence[str] | None = None):
        self.modalities = list(modalities) if modalities is not None else None

    def __call__(self, observations: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Stacks.

        Args:
            observations: Each with `pixel_values` (M, N, N) float and, optionally, `observed` (M,) bool (absent: all).

        Returns:
            `pixel_values` (B, M, N, N) float32, `observed` (B, M) bool.

        Raises:
            ValueError: There is no observation, one lacks its pixels, or their shapes differ.
        """
        if not observations:
            raise ValueError("observations: expected at least one, got none.")
        images: list[torch.Tensor] = []
        observed: list[torch.Tensor] = []
        for index, observation in enumerate(observations):
            if "pixel_values" not in observation:
                raise ValueError(
                    f"observation {index} of the batch: expected `pixel_values`, got the keys "
                    f"{sorted(observation)}. Keep `remove_unused_columns=False`, and pass a prepared dataset."
                )
            pixels = torch.as_tensor(np.asarray(observation["pixel_values"]), dtype=torch.float32)
            if pixels.ndim != 3 or pixels.shape[-1] != pixels.shape[-2]:
                raise ValueError(
                    f"observation {index} of the batch: pixel_values: expected (modalities, N, N), "
                    f"got {tuple(pixels.shape)}."
                )
            if images and pixels.shape != images[0].shape:
                raise ValueError(
                    f"observation {index} of the batch: pixel_values: expected {tuple(images[0].shape)} as in the "
                    f"first one, got {tuple(pixels.shape)}. Prepare all observations with one size and one list of "
                    "modalities; a modality that was not taken is zeros with `observed` false."
                )
            if self.modalities is not None and len(pixels) != len(self.modalities):
                raise ValueError(
                    f"observation {index} of the batch: expected {len(self.modalities)} modalities "
                    f"({', '.join(self.modalities)}), got {len(pixels)}."
                )
            flags = observation.get("observed")
            flags = torch.ones(len(pixels), dtype=torch.bool) if flags is None else torch.as_tensor(np.asarray(flags))
            if flags.shape != (len(pixels),):
                raise ValueError(
                    f"observation {index} of the batch: observed: expected ({len(pixels)},), got {tuple(flags.shape)}."
                )
            images.append(pixels)
            observed.append(flags.bool())
        return {"pixel_values": torch.stack(images), "observed": torch.stack(observed)}


__all__ = ["SolarChipDataCollator"]
