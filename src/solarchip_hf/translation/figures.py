"""What was given, what was generated and how sure it is, side by side on the sky.

Matplotlib and sunpy are imported when a figure is drawn; no window is opened. sunpy draws the Maps with their own
coordinates, so that a limb that misses the disk would show a wrong WCS.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.modalities import MODALITIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Gauss that may be drawn as black and white: the least that nearly all of the field stays below, since small images
# show weaker fields than large ones.
MAGNETOGRAM_RANGES = (50.0, 100.0, 200.0, 300.0, 500.0)
_TICKS_APART = 0.11  # of the colour bar's length


def _settings(image: Any, modality: str, *, spread: bool) -> dict[str, Any]:
    """Colour map and stretch of a channel; black where there is nothing."""
    import matplotlib
    from astropy.visualization import AsinhStretch
    from astropy.visualization.mpl_normalize import ImageNormalize

    signed = MODALITIES[modality].signed
    if signed and not spread:
        strongest = float(np.nanpercentile(np.abs(image.data), 99.8))
        bound = next((bound for bound in MAGNETOGRAM_RANGES if bound >= strongest), MAGNETOGRAM_RANGES[-1])
        norm = ImageNormalize(vmin=-bound, vmax=bound, clip=False)
        return {"cmap": matplotlib.colormaps["gray"].with_extremes(bad="black"), "norm": norm}
    top = max(float(np.nanpercentile(image.data, 99.8)), 1e-6)
    colours = matplotlib.colormaps["magma" if signed else MODALITIES[modality].colormap]
    norm = ImageNormalize(vmin=0.0, vmax=top, stretch=AsinhStretch(0.05), clip=False)
    return {"cmap": colours.with_extremes(bad="black"), "norm": norm}


def colorbar_ticks(low: float, high: float, norm: Callable[[float], float]) -> list[float]:
    """Round values that are easy to read and lie apart on a stretched colour bar.

    Args:
        low: Lower end, 0 or `-high`.
        high: Upper end, positive.
        norm: Value to place on the bar, 0 to 1.

    Returns:
        Zero and 1, 2 and 5 times powers of ten within the ends, and their negatives where the bar has such.
    """
    power = math.floor(math.log10(high))
    candidates = [digit * 10.0 ** (power - step) for step in range(4) for digit in (5, 2, 1)]
    ticks: list[float] = []
    above = float("inf")  # place of the tick above
    for value in (value for value in candidates if value <= high):
        place = float(norm(value))
        if min(above - place, place - float(norm(0.0))) >= _TICKS_APART:
            ticks.append(value)
            above = place
    return sorted([*(-value for value in ticks if low < 0), 0.0, *ticks])


def translation_figure(
    sources: dict[str, Any], prediction: Any, uncertainty: Any | None, target: str, title: str = ""
) -> "Figure":
    """Sources, prediction and uncertainty with the limb, north up.

    Args:
        sources: sunpy Maps by channel, on the canonical grid.
        prediction: The generated Map.
        uncertainty: The Map of the samples' spread; None where there was one sample.
        target: Channel of the prediction.
        title: Above the figure.

    Returns:
        The figure, with a canvas of its own.

    Raises:
        ImportError: sunpy is not installed.
    """
    import sunpy.visualization.colormaps  # noqa: F401 (registers the channels' colour maps)
    from astropy.units import Unit
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(image, name, f"given: {MODALITIES[name].label}") for name, image in sources.items()]
    panels.append((prediction, target, f"generated: {MODALITIES[target].label}"))
    if uncertainty is not None:
        panels.append((uncertainty, target, "spread of the samples"))
    figure = Figure(figsize=(4.6 * len(panels), 4.4), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    for index, (image, name, heading) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), index, projection=image)
        settings = _settings(image, name, spread=image is uncertainty)
        drawn = image.plot(axes=axes, title=False, annotate=True, autoalign=False, **settings)
        image.draw_limb(axes=axes, color="white", linewidth=0.7)
        axes.set_title(heading, fontsize=10)
        axes.coords.grid(False)
        for axis in axes.coords:
            axis.set_ticks(spacing=1000 * Unit("arcsec"))
        norm = settings["norm"]
        ticks = colorbar_ticks(norm.vmin, norm.vmax, norm)
        bar = figure.colorbar(drawn, ax=axes, shrink=0.8, label=str(image.unit), ticks=ticks)
        bar.ax.set_yticklabels([f"{tick:g}" for tick in ticks])
    figure.suptitle(title, fontsize=10)
    return figure


__all__ = ["colorbar_ticks", "translation_figure"]
