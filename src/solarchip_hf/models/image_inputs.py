"""The forms that images come in: lists and batches of them, and arrays without a header as `SolarImage`."""

from typing import Any

import numpy as np
import torch

from .geometry import canonical_scale
from .headers import SolarImage, SolarImageError
from .modalities import MODALITIES

# Any radius serves: the image is taken as filling the canonical frame already. That of SDOML.
_RSUN_ARCSEC = 976.0


def is_array(image: Any) -> bool:
    """Whether it is a NumPy array or a torch tensor."""
    return isinstance(image, np.ndarray | torch.Tensor)


def image_from_array(array: np.ndarray | torch.Tensor, modality: str, unit: str, geometry: str) -> SolarImage:
    """Takes an array as a canonical image already: square, north-up, row 0 in the south, filling the frame.

    Args:
        array: (H, H) or (1, H, H) real numbers; NaN or masked where invalid.
        modality: Name from `MODALITIES`.
        unit: Its unit.
        geometry: Grid that it is on.

    Returns:
        The image with the WCS of the canonical grid of its own size; no time.

    Raises:
        SolarImageError: The array is not a square image of real numbers.
    """
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = array.float().numpy() if array.is_floating_point() else array.numpy()  # bfloat16 has no NumPy form
    elif isinstance(array, np.ma.MaskedArray):
        array = np.ma.filled(array.astype(np.float32), np.nan)
    pixels = np.asarray(array)
    if pixels.ndim == 3 and pixels.shape[0] == 1:
        pixels = pixels[0]
    if pixels.ndim != 2 or pixels.shape[0] != pixels.shape[1] or pixels.dtype.kind not in "iuf":
        raise SolarImageError(
            "array", "shape", "a square image (H, H) of real numbers", f"{tuple(pixels.shape)} {pixels.dtype}"
        )
    size = len(pixels)
    scale = canonical_scale(_RSUN_ARCSEC, size, "rsun" if geometry == "none" else geometry)
    return SolarImage(
        data=np.ascontiguousarray(pixels, dtype=np.float32),
        modality=modality,
        source=f"array {pixels.shape}",
        instrument=MODALITIES[modality].instrument.upper(),
        time=None,
        time_nominal=None,
        exposure=None,
        quality=None,
        near_real_time=False,
        unit=unit,
        crpix=((size + 1) / 2, (size + 1) / 2),
        crval=(0.0, 0.0),
        cdelt=(scale, scale),
        rotation=((1.0, 0.0), (0.0, 1.0)),
        rsun_arcsec=_RSUN_ARCSEC,
    )


def as_list(images: Any, modality: Any) -> tuple[list[Any], list[Any]]:
    """Images and their modalities as lists of equal length.

    Args:
        images: One image, a list or tuple of images, or an array (N, H, W) or (N, 1, H, W).
        modality: One channel or None for all of them, or a list with one for each.

    Raises:
        ValueError: There is no image, the array has another shape, or the numbers differ.
    """
    if type(images) in (list, tuple):  # an astropy HDUList is a list too, but one image
        images = list(images)
    elif is_array(images) and images.ndim in (3, 4):
        if images.ndim == 4 and images.shape[1] != 1:
            raise ValueError(f"images: expected (N, H, W) or (N, 1, H, W), got {tuple(images.shape)}.")
        images = list(images[:, 0] if images.ndim == 4 else images)
    else:
        images = [images]
    if not images:
        raise ValueError("images: expected at least one, got an empty list.")
    if type(modality) not in (list, tuple):
        return images, [modality] * len(images)
    if len(modality) != len(images):
        raise ValueError(f"modality: expected one, or {len(images)} for {len(images)} images, got {len(modality)}.")
    return images, list(modality)


__all__ = ["as_list", "image_from_array", "is_array"]
