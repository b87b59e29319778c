"""Figures of a forecast: the Sun in its own colours, where the forecast comes from, and a gauge of probabilities.

Matplotlib is imported when a figure is drawn, and only its object interface is used.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from solarchip_hf.models.geometry import PLATE_SCALE_1024
from solarchip_hf.models.modalities import MODALITIES, resolve_modality
from solarchip_hf.training.figures import colormap, new_figure, save_figure

from .attribution import FlareAttribution

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAGNETOGRAM_RANGE = 500.0  # G
FLARE_COLORS = ("0.75", "#f2c14e", "#f07c2f", "#c1121f")


def draw_sun(axes: "Axes", image: np.ndarray, modality: str, rsun_pixels: float | None = None) -> None:
    """Draws one image north up: a magnetogram linearly, other channels as the fourth root of their intensity.

    Args:
        axes: Where.
        image: (N, N) physical units, row 0 in the south, NaN where there is nothing.
        modality: Its channel.
        rsun_pixels: Radius of the limb, which is then drawn.
    """
    from matplotlib.patches import Circle

    axes.set(xticks=[], yticks=[])
    axes.set_facecolor("black")
    if MODALITIES[modality].signed:
        values, low, high = image, -MAGNETOGRAM_RANGE, MAGNETOGRAM_RANGE
    else:
        values = np.clip(image, 0, None) ** 0.25
        low, high = np.nanquantile(values, [0.01, 0.999]) if np.isfinite(values).any() else (0.0, 1.0)
    axes.imshow(values, origin="lower", cmap=colormap(modality), vmin=low, vmax=high, interpolation="nearest")
    if rsun_pixels:
        centre = (len(image) - 1) / 2
        axes.add_patch(Circle((centre, centre), rsun_pixels, fill=False, color="0.6", linewidth=0.6))


def draw_attribution(axes: "Axes", values: np.ndarray) -> Any:
    """Lays a map over an image: red speaks for a flare, blue against, clear where it says little.

    Args:
        axes: Where `draw_sun` has drawn.
        values: (N, N) smoothed attribution.

    Returns:
        The colour map's scale, for a colour bar.
    """
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bound = max(float(np.abs(values).max()), 1e-12)
    scale = ScalarMappable(Normalize(-bound, bound), matplotlib.colormaps["seismic"])
    colours = scale.to_rgba(values)
    colours[..., 3] = np.clip(1.6 * np.abs(values) / bound, 0.0, 0.75)
    axes.imshow(colours, origin="lower", interpolation="bilinear")
    return scale


def attribution_figure(
    attribution: FlareAttribution, modality: str | int | None = None, path: str | Path | None = None
) -> "Figure":
    """One image with the attribution laid over it; see `FlareAttribution.overlay`."""
    name = next(iter(attribution.maps)) if modality is None else resolve_modality(modality)
    figure = new_figure(6.0, 5.4)
    _attribution_panel(figure, figure.subplots(), attribution, name)
    if path is not None:
        save_figure(figure, path)
    return figure


def forecast_figure(forecast: Mapping[str, Any], path: str | Path | None = None) -> "Figure":
    """A forecast on one page: its images with their attribution, and the probabilities as a gauge.

    Args:
        forecast: What the pipeline answered with `attribution=True`.
        path: Where to save the figure; not saved if None.

    Returns:
        The figure.

    Raises:
        ValueError: The forecast carries no attribution, hence no image.
    """
    attribution = forecast.get("attribution")
    if attribution is None:
        raise ValueError(
            "forecast: expected one with an attribution, got none; call the pipeline with attribution=True."
        )
    count = len(attribution.maps)
    figure = new_figure(4.6 * count + 3.6, 5.2)
    panels = figure.subplots(1, count + 1, squeeze=False, gridspec_kw={"width_ratios": [1.0] * count + [0.7]})[0]
    for axes, name in zip(panels, attribution.maps, strict=False):
        _attribution_panel(figure, axes, attribution, name)
    draw_gauge(panels[-1], forecast)
    drawn = "SYNTHETIC Sun, " if any(image["synthetic"] for image in forecast["images"]) else ""
    quick = ", from an 8-bit quick-look" if any(image["approximate"] for image in forecast["images"]) else ""
    window = f"valid after {forecast['valid_from']} until {forecast['valid_until']}" if forecast["valid_from"] else ""
    figure.suptitle(
        f"{drawn}largest flare within {forecast['window']['horizon'].replace('h', ' h')}{quick}\n{window}", fontsize=11
    )
    if path is not None:
        save_figure(figure, path)
    return figure


def draw_gauge(axes: "Axes", forecast: Mapping[str, Any]) -> None:
    """Draws probabilities of reaching each class as bars, with the threshold of warning marked on each."""
    names = list(forecast["exceedance"])
    values = [forecast["exceedance"][name] for name in names]
    thresholds, warnings = forecast["thresholds"] or {}, forecast["warnings"] or {}
    colours = FLARE_COLORS[1:] if len(names) == 3 else ["#f07c2f"] * len(names)
    rows = np.arange(len(names))[::-1]
    axes.barh(rows, np.ones(len(names)), color="0.93", height=0.55)
    axes.barh(rows, values, color=colours, height=0.55)
    for row, name, value in zip(rows, names, values, strict=True):
        label = name.removesuffix("_plus").upper() + "+"
        axes.text(-0.03, row, label, ha="right", va="center", fontsize=13, fontweight="bold")
        axes.text(1.03, row, f"{value:.0%}" if value >= 0.1 else f"{value:.1%}", ha="left", va="center", fontsize=12)
        if name in thresholds:
            axes.plot([thresholds[name]] * 2, [row - 0.36, row + 0.36], color="black", linewidth=1.5)
        if warnings.get(name):
            axes.text(0.5, row + 0.4, "warning", ha="center", va="center", fontsize=9, color="#c1121f")
    axes.set(
        xlim=(0, 1), ylim=(-0.8, len(names) - 0.2), yticks=[], xticks=[0, 0.5, 1], xticklabels=["0", "50%", "100%"]
    )
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    kind = "calibrated" if forecast["calibrated"] else "not calibrated"
    marks = "; black line: warning from here" if thresholds else ""
    axes.set_xlabel(f"probability, {kind}{marks}", fontsize=9)


def _attribution_panel(figure: "Figure", axes: "Axes", attribution: FlareAttribution, name: str) -> None:
    facts, image = attribution.headers[name], attribution.images[name]
    scale = abs(facts.cdelt[0]) or PLATE_SCALE_1024
    draw_sun(axes, image, name, facts.rsun_arcsec / scale)
    drawn = draw_attribution(axes, attribution.smoothed(name, len(image) / 64))
    bar = figure.colorbar(drawn, ax=axes, shrink=0.75, pad=0.02)
    bar.set_label(f"what speaks for {attribution.target.removesuffix('_plus').upper()}+ (log-odds a pixel)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    time = f" {facts.time:%Y-%m-%d %H:%M} UTC" if facts.time else ""
    axes.set_title(f"{MODALITIES[name].label}{time}", fontsize=10)


__all__ = ["attribution_figure", "draw_attribution", "draw_gauge", "draw_sun", "forecast_figure"]
