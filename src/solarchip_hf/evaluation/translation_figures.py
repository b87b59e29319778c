"""Figures of translations: source, truth, prediction, error and spread; rivals side by side; spread against error.

Matplotlib is imported when a figure is drawn, and only its object interface is used. Images are drawn north up with the
disk's limb, in sunpy's colour maps where sunpy is installed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.modalities import MODALITIES
from .translation_cases import TranslationCases
from .translation_fidelity.ensemble_scores import ensemble_spread
from .translation_fidelity.image_scores import INNER_SHARE, RADIUS_SHARE, radial_distance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Bounds in gauss of where a magnetogram's greys end: sunpy's +-1500 G show spots only.
FIELD_SHOWN = (50.0, 500.0)
ERROR_COLORS = "RdBu_r"
RIVALS_A_LINE = 5


def translation_figure(
    cases: TranslationCases,
    prediction: np.ndarray,
    *,
    uncertainty: np.ndarray | None = None,
    indices: Sequence[int] = (0,),
    title: str = "",
) -> "Figure":
    """Source, truth, prediction, error and uncertainty, a row an observation.

    Args:
        cases: The held-out observations.
        prediction: (N, H, H) in physical units.
        uncertainty: (N, H, H), the spread of the samples; left out if None.
        indices: Observations that are drawn.
        title: Above the figure; say there what is synthetic.

    Returns:
        The figure. Truth and prediction share a scale; error and uncertainty have linear ones of their own.
    """
    target = cases.target_modality
    names = [MODALITIES[name].label for name in cases.source_modalities]
    names += [f"{MODALITIES[target].label}, truth", "prediction", f"error / {cases.unit}"]
    names += [f"uncertainty / {cases.unit}"] if uncertainty is not None else []
    figure = _figure(2.1 * len(names) + 0.6, 2.15 * len(indices) + 0.5)
    grid = figure.subplots(len(indices), len(names), squeeze=False)
    for line, index in zip(grid, indices, strict=True):
        panels = iter(line)
        for position, name in enumerate(cases.source_modalities):
            image = cases.processor.unscale(cases.sources[index, position].numpy(), name)
            _draw(next(panels), image, name, _norm(image, name))
        norm = _norm(cases.truth[index], target)
        _draw(next(panels), cases.truth[index], target, norm)
        _draw(next(panels), prediction[index], target, norm)
        error = prediction[index] - cases.truth[index]
        bound = max(float(np.nanquantile(np.abs(error), 0.995)), 1e-6) if np.isfinite(error).any() else 1.0
        axes = next(panels)
        shown = [_draw(axes, error, None, (-bound, bound))]
        figure.colorbar(shown[0], ax=axes, shrink=0.75, pad=0.02).ax.tick_params(labelsize=6)
        if uncertainty is not None:
            axes = next(panels)
            top = np.nanquantile(uncertainty[index], 0.995) if np.isfinite(uncertainty[index]).any() else 0.0
            drawn = _draw(axes, uncertainty[index], None, (0, max(float(top), 1e-6)), palette="viridis")
            figure.colorbar(drawn, ax=axes, shrink=0.75, pad=0.02).ax.tick_params(labelsize=6)
        line[0].set_ylabel(f"{cases.times[index]:%Y-%m-%d %H:%M}", fontsize=8)
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title(name, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def rivals_figure(
    cases: TranslationCases, predictions: Mapping[str, np.ndarray], *, index: int = 0, title: str = ""
) -> "Figure":
    """The truth and every method's image of one observation on one scale, each with its error below.

    Args:
        cases: The held-out observations.
        predictions: Name to (N, H, H) in physical units.
        index: The observation.
        title: Above the figure; say there what is synthetic.

    Returns:
        The figure.
    """
    target, truth = cases.target_modality, cases.truth[index]
    columns = min(RIVALS_A_LINE, len(predictions)) + 1
    lines = -(-len(predictions) // RIVALS_A_LINE)
    figure = _figure(1.9 * columns + 0.6, 4.1 * lines + 0.4)
    grid = figure.subplots(2 * lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    norm = _norm(truth, target)
    _draw(grid[0, 0], truth, target, norm)
    grid[0, 0].set_title("truth", fontsize=8)
    finite = truth[np.isfinite(truth)]
    bound = max(float(np.quantile(np.abs(finite - np.median(finite)), 0.99)), 1e-6)
    drawn = None
    for number, (name, images) in enumerate(predictions.items()):
        line, column = 2 * (number // RIVALS_A_LINE), number % RIVALS_A_LINE + 1
        _draw(grid[line, column], images[index], target, norm)
        drawn = _draw(grid[line + 1, column], images[index] - truth, None, (-bound, bound))
        grid[line, column].set_title(name, fontsize=8)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=list(grid[:, -1]), shrink=0.5, pad=0.02)
        bar.set_label(f"error / {cases.unit}", fontsize=7)
        bar.ax.tick_params(labelsize=6)
    figure.suptitle(title or f"{cases.times[index]:%Y-%m-%d %H:%M}", fontsize=10)
    return figure


def spread_figure(
    cases: TranslationCases, samples: np.ndarray, *, bins: int = 10, max_points: int = 20000, title: str = ""
) -> "Figure":
    """Error of the ensemble's mean against its spread, pixel by pixel and in classes of equal number.

    Args:
        cases: The held-out observations.
        samples: (N, m, H, H) in physical units, m of 2 or more.
        bins: Classes of spread.
        max_points: Most pixels that are drawn; the classes take all.
        title: Above the figure; say there what is synthetic.

    Returns:
        The figure; on the dashed line the RMSE of a class is what its spread says.
    """
    from matplotlib.ticker import NullFormatter

    spread, error = ensemble_spread(samples, cases.truth)
    inner = np.isfinite(error) & (radial_distance(samples.shape[-1]) < INNER_SHARE)
    spread, error = spread[inner], np.abs(error[inner])
    figure = _figure(5.0, 4.6)
    axes = figure.subplots()
    step = max(1, len(spread) // max_points)
    axes.scatter(spread[::step], error[::step], s=2, alpha=0.15, color="C0", linewidths=0)
    axes.plot([], [], "o", color="C0", markersize=3, label="pixels")
    edges = np.unique(np.quantile(spread, np.linspace(0, 1, bins + 1)))
    if len(edges) > 1:
        inside = np.clip(np.searchsorted(edges, spread, side="right") - 1, 0, len(edges) - 2)
        count = np.bincount(inside, minlength=len(edges) - 1)
        centre = np.sqrt(np.bincount(inside, spread**2, len(edges) - 1) / count)
        root = np.sqrt(np.bincount(inside, error**2, len(edges) - 1) / count)
        axes.plot(centre, root, "o-", color="C3", markersize=4, label="RMSE by class of spread")
    low, high = np.quantile(spread, [0.001, 0.999])
    low, high = max(float(low), 1e-3 * max(float(high), 1e-6)), max(float(high), 1e-6)
    axes.plot([low, high], [low, high], "--", color="0.3", linewidth=1, label="spread = error")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low / 10, 3 * max(high, float(error.max(initial=0)))))
    axes.set(xlabel=f"spread of the samples / {cases.unit}", ylabel=f"error of their mean / {cases.unit}", title=title)
    axes.title.set_fontsize(9)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    return figure


def write_figures(
    cases: TranslationCases,
    predictions: Mapping[str, np.ndarray],
    folder: str | Path,
    *,
    method: str,
    samples: np.ndarray | None = None,
    note: str = "",
    shown: int = 3,
) -> list[Path]:
    """Writes the figures of one method and of its rivals as PNG files.

    Args:
        cases: The held-out observations.
        predictions: Name to (N, H, H) in physical units.
        folder: Where to.
        method: The row whose translation, error and spread are drawn.
        samples: (N, m, H, H) of that method.
        note: What the data are, put into every title.
        shown: Observations drawn, evenly spread.

    Returns:
        The files written.
    """
    folder, tail = Path(folder), f" ({note})" if note else ""
    folder.mkdir(parents=True, exist_ok=True)
    several = samples is not None and samples.shape[1] > 1
    indices = [int((position + 0.5) * len(cases) / shown) for position in range(min(shown, len(cases)))]
    indices = indices if len(cases) >= shown else list(range(len(cases)))
    what = f"{', '.join(cases.source_modalities)} to {cases.target_modality}{tail}"
    figures = {
        "translation": translation_figure(
            cases,
            predictions[method],
            uncertainty=samples.std(axis=1, ddof=1) if several and samples is not None else None,
            indices=indices,
            title=f"{method}: {what}",
        ),
        "rivals": rivals_figure(
            cases,
            predictions,
            index=indices[len(indices) // 2],
            title=f"{what}, {cases.times[indices[len(indices) // 2]]:%Y-%m-%d %H:%M}",
        ),
    }
    if several and samples is not None:
        figures["spread"] = spread_figure(cases, samples, title=f"{method}: {what}")
    written = []
    for name, figure in figures.items():
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1])
    return written


def _colors(modality: str) -> Any:
    import matplotlib

    if MODALITIES[modality].signed:
        return matplotlib.colormaps["gray"]
    try:
        from sunpy.visualization.colormaps import cmlist
    except ImportError:
        return matplotlib.colormaps["afmhot"]
    return cmlist[MODALITIES[modality].colormap]


def _norm(image: np.ndarray, modality: str) -> Any:
    """Linear for a field; for a passband an inverse hyperbolic sine above half of the disk's median."""
    from matplotlib.colors import AsinhNorm, Normalize

    finite = image[np.isfinite(image)]
    if not finite.size:
        return Normalize(0, 1)
    if MODALITIES[modality].signed:
        bound = float(np.clip(np.quantile(np.abs(finite), 0.998), *FIELD_SHOWN))
        return Normalize(-bound, bound)
    median = max(float(np.median(finite)), 1e-3)
    top = max(float(np.quantile(finite, 0.9995)), 2 * median)
    return AsinhNorm(median / 2, vmin=0, vmax=top)


def _draw(axes: "Axes", image: np.ndarray, modality: str | None, norm: Any, *, palette: str = ERROR_COLORS) -> Any:
    """One image north up, with the photospheric limb; without a modality, an error between two bounds."""
    from matplotlib.patches import Circle

    size = len(image)
    scale = (
        {"norm": norm, "cmap": _colors(modality)} if modality else {"vmin": norm[0], "vmax": norm[1], "cmap": palette}
    )
    drawn = axes.imshow(image, origin="lower", interpolation="nearest", **scale)
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[], facecolor="black" if modality else "0.9")
    centre = (size - 1) / 2
    color = "white" if modality else "0.3"
    axes.add_patch(Circle((centre, centre), RADIUS_SHARE * size, fill=False, color=color, linewidth=0.6, alpha=0.7))
    return drawn


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


__all__ = ["rivals_figure", "spread_figure", "translation_figure", "write_figures"]
