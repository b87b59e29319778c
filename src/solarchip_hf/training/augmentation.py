"""Augmentation that respects the Sun: one draw a training step, applied on the device to the whole batch.

Hale's law (the leading polarity of a hemisphere) and Joy's law (the tilt of active regions) both survive a north-south
flip together with a reversed sign of the field; a reversed sign alone turns the Sun into that of the other cycle, Joy's
law kept. East-west flips and arbitrary angles break Joy's law and confuse the limb on which regions arrive with the one
on which they leave: they make up the preset `published` and are used nowhere else.

All observations of a step share one draw, on every process: a draw that differed between observations, or between the
modalities of one, would be a cue to match them by.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

PRESETS = ("solar", "published", "none")


@dataclass(frozen=True)
class AugmentationDraw:
    """What happens to every image of one micro-step.

    Attributes:
        flip_north_south: Mirror at the solar equator's image (rows reversed).
        flip_east_west: Mirror at the central meridian's image (columns reversed).
        reverse_polarity: Reverse the sign of signed modalities.
        angle: Roll in degrees, counter-clockwise with north up and east to the left (towards the east limb).
    """

    flip_north_south: bool = False
    flip_east_west: bool = False
    reverse_polarity: bool = False
    angle: float = 0.0


def sign_shifts(modalities: list[str], statistics: dict[str, Any] | None) -> list[float | None]:
    """What a reversed sign adds to a z-scored pixel, per modality.

    A pixel is `z = (y - mean) / std` of the transformed field `y`, an odd function of the physical one; hence `-y` is
    `-z - 2 mean / std`.

    Args:
        modalities: Names in the order of the batch's second axis.
        statistics: The image processor's statistics (`statistics["modalities"][name]["mean" | "std"]`); None means
            a mean of zero.

    Returns:
        `2 mean / std` for a signed modality, None for an unsigned one.
    """
    from ..models.modalities import MODALITIES, resolve_modality

    table = (statistics or {}).get("modalities", {})
    shifts: list[float | None] = []
    for name in modalities:
        if not MODALITIES[resolve_modality(name)].signed:
            shifts.append(None)
            continue
        entry = table.get(name)
        shifts.append(2.0 * float(entry["mean"]) / float(entry["std"]) if entry else 0.0)
    return shifts


class SolarAugmentation:
    """Draws and applies the augmentation of a training step.

    Args:
        preset: `solar` (north-south flip with the sign of the field reversed, probability one half; reversed polarity,
            one half; roll within `roll_degrees`), `published` (flips of both axes, one half each; any angle; signs
            untouched) or `none`.
        shifts: Per modality, what a reversed sign adds (see `sign_shifts`); None marks an unsigned modality.
        polarity_reversal: Whether `solar` reverses the polarity at random; off where the sign is the target.
        roll_degrees: Largest roll of the preset `solar`, in degrees.

    Raises:
        ValueError: The preset is unknown, or the roll is negative or not finite.
    """

    def __init__(
        self,
        preset: str = "solar",
        shifts: list[float | None] | None = None,
        *,
        polarity_reversal: bool = True,
        roll_degrees: float = 3.0,
    ):
        if preset not in PRESETS:
            raise ValueError(f"augmentation: expected one of {', '.join(PRESETS)}, got {preset!r}.")
        if not (math.isfinite(roll_degrees) and 0 <= roll_degrees <= 180):
            raise ValueError(f"roll_degrees: expected a number within 0..180, got {roll_degrees!r}.")
        self.preset = preset
        self.shifts = list(shifts) if shifts is not None else None
        self.polarity_reversal = polarity_reversal
        self.roll_degrees = roll_degrees

    def draw(self, seed: int, global_step: int, micro_step: int = 0) -> AugmentationDraw:
        """The draw of a micro-step: a function of its three arguments, hence equal on all ranks and after a resume."""
        if self.preset == "none":
            return AugmentationDraw()
        random = np.random.default_rng([seed % 2**63, global_step, micro_step])
        first, second, turn = random.random() < 0.5, random.random() < 0.5, random.uniform(-1.0, 1.0)
        if self.preset == "published":
            return AugmentationDraw(flip_north_south=first, flip_east_west=second, angle=180.0 * turn)
        reverse = self.polarity_reversal and second
        return AugmentationDraw(
            flip_north_south=first, reverse_polarity=bool(first) != bool(reverse), angle=self.roll_degrees * turn
        )

    def apply(self, pixel_values: torch.Tensor, draw: AugmentationDraw) -> torch.Tensor:
        """Applies one draw to all observations and modalities.

        Args:
            pixel_values: (B, M, N, N) float, row 0 in the south, column 0 in the east, z-scored, exactly zero where
                nothing is seen. An image of NaN (a missing modality) stays NaN and touches no other.
            draw: What to do.

        Returns:
            (B, M, N, N) of the same dtype. Zero stays zero under a reversed sign; after a roll of the preset `solar`
            everything outside the inscribed circle is zero.

        Raises:
            ValueError: The shape is not (B, M, N, N), or the number of modalities differs from that of `shifts`.
        """
        if pixel_values.ndim != 4 or pixel_values.shape[-1] != pixel_values.shape[-2]:
            raise ValueError(f"pixel_values: expected (B, M, N, N), got {tuple(pixel_values.shape)}.")
        if draw.reverse_polarity and self.shifts is not None:
            pixel_values = self._reverse_sign(pixel_values)
        axes = [axis for axis, flip in ((-2, draw.flip_north_south), (-1, draw.flip_east_west)) if flip]
        if axes:
            pixel_values = pixel_values.flip(axes)
        if draw.angle:
            pixel_values = rotate(pixel_values, draw.angle, inscribed=self.preset == "solar")
        return pixel_values

    def _reverse_sign(self, pixel_values: torch.Tensor) -> torch.Tensor:
        modalities = pixel_values.shape[1]
        if len(self.shifts) != modalities:
            raise ValueError(
                f"pixel_values: expected {len(self.shifts)} modalities as in the statistics, got {modalities}."
            )
        signed = torch.tensor([shift is not None for shift in self.shifts], device=pixel_values.device)
        shift = pixel_values.new_tensor([shift or 0.0 for shift in self.shifts])
        reversed_field = -pixel_values - shift[:, None, None]
        # an exact zero is the fill value (off the disk, missing pixels), not a field strength
        return torch.where(signed[:, None, None] & (pixel_values != 0), reversed_field, pixel_values)

    def __call__(self, pixel_values: torch.Tensor, seed: int, global_step: int, micro_step: int = 0) -> torch.Tensor:
        """`apply` of `draw`."""
        return self.apply(pixel_values, self.draw(seed, global_step, micro_step))


def rotate(images: torch.Tensor, angle: float, inscribed: bool = True) -> torch.Tensor:
    """Rotates images about their centre, bilinearly.

    Args:
        images: (B, M, N, N) float; row 0 in the south.
        angle: Degrees, counter-clockwise as seen with row 0 at the bottom.
        inscribed: Whether to set everything outside the inscribed circle to zero, so that no corner leaves a wedge.

    Returns:
        (B, M, N, N); what turns in from outside the frame is zero.
    """
    size = images.shape[-1]
    radians = math.radians(angle)
    cosine, sine = math.cos(radians), math.sin(radians)
    # each output pixel looks up where it came from, which is the inverse rotation; rows grow northward
    theta = torch.tensor([[cosine, sine, 0.0], [-sine, cosine, 0.0]], device=images.device, dtype=torch.float32)
    grid = F.affine_grid(theta[None], [1, 1, size, size], align_corners=False)
    flat = images.reshape(1, -1, size, size).float()  # one grid for all: the batch becomes channels
    rotated = F.grid_sample(flat, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    if inscribed:
        offset = torch.arange(size, device=images.device, dtype=torch.float32) - (size - 1) / 2
        outside = offset[:, None] ** 2 + offset[None, :] ** 2 > (size / 2) ** 2
        rotated = rotated.masked_fill(outside, 0.0)
    return rotated.reshape(images.shape).to(images.dtype)


__all__ = ["PRESETS", "AugmentationDraw", "SolarAugmentation", "rotate", "sign_shifts"]
