"""Pictures of the synthetic Sun."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ...models.modalities import MODALITIES
from .sun import SyntheticSun

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def contact_sheet(sun: SyntheticSun, times: Iterable[Any], modalities: Iterable[str] | None = None) -> "Figure":
    """A row a time, a column a channel, in the field's colours where sunpy is there and in greys where it is not.

    Args:
        sun: The Sun to draw.
        times: UTC.
        modalities: Names; all eleven by default.

    Returns:
        A figure without any global state: save it by its `savefig`.
    """
    from matplotlib.figure import Figure

    colours = _has_solar_colours()
    names = list(modalities) if modalities is not None else list(MODALITIES)
    times = list(times)
    figure = Figure(figsize=(1.5 * len(names), 1.6 * len(times) + 0.3), layout="constrained")
    figure.suptitle(f"Synthetic Sun, seed {sun.seed}: drawn by a model, not observed", fontsize=9)
    axes = figure.subplots(len(times), len(names), squeeze=False)
    for row, time in zip(axes, times, strict=True):
        images = sun.observe(time, names)
        for axis, name in zip(row, names, strict=True):
            modality = MODALITIES[name]
            if name == "hmi":
                axis.imshow(images[name], cmap="gray", vmin=-150, vmax=150, origin="lower")
            else:
                stretched, top = _stretch(images[name], 10.0 if modality.wavelength < 1000 else 2.5)
                colour = modality.colormap if colours else "gray"
                axis.imshow(stretched, cmap=colour, vmin=0.0, vmax=top, origin="lower")
            axis.set_title(f"{modality.label}\n{time:%Y-%m-%d %H:%M}", fontsize=5)
            axis.axis("off")
    return figure


def _stretch(image: np.ndarray, top: float) -> tuple[np.ndarray, float]:
    """Inverse hyperbolic sine of the brightness over the disk's median, and the value of `top` times that median."""
    quarter = image.shape[0] // 4
    middle = max(float(np.median(image[quarter:-quarter, quarter:-quarter])), 1e-3)
    return np.arcsinh(2.0 * np.clip(image, 0.0, None) / middle), float(np.arcsinh(2.0 * top))


def _has_solar_colours() -> bool:
    try:
        import sunpy.visualization.colormaps
    except ImportError:
        return False
    return sunpy.visualization.colormaps is not None
