"""What was given, what was generated and how sure it is, side by side on the sky.

Matplotlib and sunpy are imported when a figure is drawn; no window is opened. sunpy draws the Maps with their own
coordinates, so that a limb that misses the disk would show a wrong WCS.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.modalities import MODALITIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAGNETOGRAM_RANGE = 300.0  # gauss, drawn as black and white


def _settings(image: Any, modality: str, *, spread: bool) -> dict[str, Any]:
    """Colour map and stretch of a channel; black where there is nothing."""
    import matplotlib
    from astropy.visualization import AsinhStretch
    from astropy.visualization.mpl_normalize import ImageNormalize

    signed = MODALITIES[modality].signed
    if signed and not spread:
        norm = ImageNormalize(vmin=-MAGNETOGRAM_RANGE, vmax=MAGNETOGRAM_RANGE, clip=False)
        return {"cmap": matplotlib.colormaps["gray"].with_extremes(bad="black"), "norm": norm}
    top = max(float(np.nanpercentile(image.data, 99.8)), 1e-6)
    colours = matplotlib.colormaps["magma" if signed else MODALITIES[modality].colormap]
    norm = ImageNormalize(vmin=0.0, vmax=top, stretch=AsinhStretch(0.05), clip=False)
    return {"cmap": colours.with_extremes(bad="black"), "norm": norm}


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
        low, high = settings["norm"].vmin, settings["norm"].vmax
        ticks = [low, low / 2, 0, high / 2, high] if low < 0 else [high * share for share in (0, 0.05, 0.2, 0.5, 1)]
        bar = figure.colorbar(drawn, ax=axes, shrink=0.8, label=str(image.unit), ticks=ticks)
        bar.ax.set_yticklabels([f"{tick:.3g}" for tick in ticks])
    figure.suptitle(title, fontsize=10)
    return figure


__all__ = ["translation_figure"]
