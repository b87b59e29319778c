"""Figures of a pretraining run: reconstructions, similarity matrices, retrieval beside its controls, training curves.

Matplotlib is imported when a figure is drawn, and only its object interface is used: no window, no global state. Images
are drawn north up (row 0 at the bottom) with the disk's limb, in sunpy's colour maps where sunpy is installed.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models.geometry import RSUN_PIXELS_1024
from ..models.modalities import MODALITIES, resolve_modality
from .retrieval import RetrievalTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# stand-ins of matplotlib for sunpy's tables, by hue
FALLBACK_COLORMAPS = {
    "hmi": "gray",
    "aia94": "YlGn_r",
    "aia131": "GnBu_r",
    "aia171": "YlOrBr_r",
    "aia193": "copper",
    "aia211": "RdPu_r",
    "aia304": "gist_heat",
    "aia335": "PuBu_r",
    "aia1600": "cividis",
    "aia1700": "pink",
    "aia4500": "YlOrBr_r",
}
TERMS = {
    "cls_loss": "class term",
    "patch_loss": "patch term",
    "intra_loss": "intra term",
    "reconstruction_loss": "reconstruction",
    "kl_loss": "KL",
}


def colormap(modality: str):
    """The channel's colour map: sunpy's where it is installed, else one of matplotlib of a similar hue.

    A magnetogram is drawn in grey, positive field white: sunpy's `hmimag` is made for +-1500 G on a linear scale.
    """
    import matplotlib

    name = resolve_modality(modality)
    if MODALITIES[name].signed:
        return matplotlib.colormaps["gray"]
    try:
        from sunpy.visualization.colormaps import cmlist
    except ImportError:
        return matplotlib.colormaps[FALLBACK_COLORMAPS[name]]
    return cmlist[MODALITIES[name].colormap]


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure with a canvas of its own, in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: str | Path) -> Path:
    """Writes a figure and returns where."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def draw_limb(axes: "Axes", size: int, **style: Any) -> None:
    """Draws the photospheric limb of the `rsun` grid onto an image of `size` pixels."""
    from matplotlib.patches import Circle

    centre = (size - 1) / 2
    style = {"color": "white", "linewidth": 0.6, "alpha": 0.7, **style}
    axes.add_patch(Circle((centre, centre), RSUN_PIXELS_1024 * size / 1024, fill=False, **style))


def reconstruction_figure(
    pixel_values: np.ndarray,
    reconstruction: np.ndarray,
    modalities: Sequence[str],
    *,
    observed: np.ndarray | None = None,
    support: np.ndarray | None = None,
    title: str = "",
    limb: bool = True,
) -> "Figure":
    """Input, reconstruction and their difference, a column a modality.

    Args:
        pixel_values: (M, N, N) scaled images of one observation, row 0 in the south.
        reconstruction: (M, N, N) the model's.
        modalities: The M names.
        observed: (M,) bool; what was not observed is said so, with its reconstruction left out.
        support: (M, N, N) bool, pixels that the reconstruction is asked for; the rest is drawn empty.
        title: Above the figure.
        limb: Whether to draw the limb (meaningful for the `rsun` geometry).

    Returns:
        The figure; the differences are in deviations of the scaled image, on one scale for all.
    """
    pixel_values, reconstruction = np.asarray(pixel_values, float), np.asarray(reconstruction, float)
    count, size = len(modalities), pixel_values.shape[-1]
    observed = np.ones(count, dtype=bool) if observed is None else np.asarray(observed, dtype=bool)
    figure = new_figure(1.9 * count + 0.9, 6.3)
    grid = figure.subplots(3, count, squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    shown = None
    for column, name in enumerate(modalities):
        seen = np.ones((size, size), dtype=bool) if support is None else np.asarray(support[column], dtype=bool)
        image, guess = (np.where(seen, array[column], np.nan) for array in (pixel_values, reconstruction))
        if observed[column]:
            low, high = _limits(image, MODALITIES[resolve_modality(name)].signed)
        rows = (image, guess, guess - image)
        for row, (axes, values) in enumerate(zip(grid[:, column], rows, strict=True)):
            axes.set(xticks=[], yticks=[])
            if row == 0:
                axes.set_title(MODALITIES[resolve_modality(name)].label, fontsize=9)
            if not observed[column]:
                axes.set_facecolor("0.9")
                axes.text(0.5, 0.5, "not observed", ha="center", va="center", transform=axes.transAxes, fontsize=8)
                continue
            palette = colormap(name) if row < 2 else "RdBu_r"
            bounds = (low, high) if row < 2 else (-1.5, 1.5)
            axes.set_facecolor("black" if row < 2 else "0.9")
            drawn = axes.imshow(values, origin="lower", cmap=palette, vmin=bounds[0], vmax=bounds[1])
            shown = drawn if row == 2 else shown
            if limb:
                draw_limb(axes, size, **({"color": "0.3"} if row == 2 else {}))
    for axes, label in zip(grid[:, 0], ("input", "reconstruction", "difference"), strict=True):
        axes.set_ylabel(label, fontsize=9)
    if shown is not None:
        figure.colorbar(shown, ax=list(grid[2]), shrink=0.8, aspect=12, pad=0.01, label="difference / deviation")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _limits(image: np.ndarray, signed: bool) -> tuple[float, float]:
    values = image[np.isfinite(image)]
    if not values.size:
        return 0.0, 1.0
    if signed:
        bound = max(float(np.quantile(np.abs(values), 0.998)), 1e-3)
        return -bound, bound
    low, high = np.quantile(values, [0.02, 0.998])
    return float(low), float(max(high, low + 1e-3))


def similarity_figure(
    matrices: Mapping[str, np.ndarray], *, times: Sequence[datetime] | None = None, title: str = ""
) -> "Figure":
    """Similarity of all queries with the whole gallery, a panel a method, both in time order.

    A network that retrieves shows a bright diagonal; one that only knows the date shows a broad band; slow decay away
    from the diagonal is the Sun's own memory.

    Args:
        matrices: Name of the panel to (N, N) similarity, rows being queries.
        times: N times of the gallery in order; None counts observations.
        title: Above the figure.

    Returns:
        The figure; every panel has its own colour scale, from the 1st to the 99.9th percentile.
    """
    columns = min(4, len(matrices))
    lines = -(-len(matrices) // columns)
    figure = new_figure(3.4 * columns + 0.3, 3.3 * lines + 0.5)
    panels = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    span = None
    label = "gallery observation"
    if times is not None and len(times) > 1:
        days = (times[-1] - times[0]).total_seconds() / 86400
        span, label = (0.0, days, 0.0, days), f"days since {times[0]:%Y-%m-%d %H:%M}"
    for axes in panels[len(matrices) :]:
        axes.set_visible(False)
    for axes, (name, matrix) in zip(panels, matrices.items(), strict=False):
        low, high = np.quantile(matrix, [0.01, 0.999])
        image = axes.imshow(
            matrix, origin="lower", cmap="magma", vmin=low, vmax=high, extent=span, interpolation="nearest"
        )
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
        figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    panels[0].set_ylabel("query, " + label, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def retrieval_figure(table: RetrievalTable, *, title: str = "") -> "Figure":
    """Recall@1 of every method and pair with its interval, against chance.

    Args:
        table: Rows of the network and of the controls.
        title: Above the figure.

    Returns:
        The figure.
    """
    methods = table.methods()
    pairs = list(dict.fromkeys(row["pair"] for row in table.rows))
    figure = new_figure(7.5, max(2.2, 0.8 + 0.5 * len(methods) + 0.12 * len(methods) * len(pairs)))
    axes = figure.subplots()
    height = 0.8 / max(1, len(pairs))
    for index, pair in enumerate(pairs):
        for position, method in enumerate(methods):
            rows = [row for row in table.rows if row["method"] == method and row["pair"] == pair]
            if not rows:
                continue
            row, where = rows[0], position + (index - (len(pairs) - 1) / 2) * height
            color = f"C{index}"
            axes.barh(where, row["recall@1"], height * 0.9, color=color, label=pair if position == 0 else None)
            axes.plot([row["recall@1_low"], row["recall@1_high"]], [where, where], color="0.2", linewidth=1)
    chance = np.mean([row["chance@1"] for row in table.rows]) if table.rows else 0.0
    axes.axvline(chance, color="black", linestyle=":", linewidth=1, label="chance")
    axes.set(yticks=range(len(methods)), yticklabels=methods, xlim=(0, 1), xlabel="recall@1 (bars: 95% interval)")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=min(6, len(pairs) + 1))
    if title:
        axes.set_title(title, fontsize=10)
    return figure


def training_curves(log_history: Sequence[Mapping[str, float]], *, title: str = "") -> "Figure":
    """Every term of the loss over the optimisation steps, training and held-out, and retrieval where evaluated.

    Args:
        log_history: `trainer.state.log_history`.
        title: Above the figure.

    Returns:
        The figure; terms that never occur have no panel.
    """
    terms = [term for term in TERMS if any(term in entry for entry in log_history)]
    recalls = sorted({key for entry in log_history for key in entry if key.startswith("eval_") and "recall@1" in key})
    count = len(terms) + bool(recalls)
    if not count:
        raise ValueError("log_history: expected at least one logged term of the loss, got none.")
    figure = new_figure(3.1 * min(count, 3) + 0.4, 2.4 * -(-count // 3) + 0.4)
    panels = figure.subplots(-(-count // 3), min(count, 3), squeeze=False).reshape(-1)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("optimisation step", fontsize=8)
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes, term in zip(panels, terms, strict=False):
        for key, label, style in ((term, "training", "-"), (f"eval_{term}", "held out", "o--")):
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=3, linewidth=1.2)
        axes.set_title(TERMS[term], fontsize=9)
        axes.legend(fontsize=7, frameon=False)
    for key in recalls:
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        name = key.removeprefix("eval_").replace("_recall@1", "").replace("_", " ")
        panels[len(terms)].plot(*zip(*points, strict=True), "o-", label=name, markersize=3, linewidth=1.2)
    if recalls:
        panels[len(terms)].set_title("held-out recall@1", fontsize=9)
        panels[len(terms)].set_ylim(-0.02, 1.02)
        panels[len(terms)].legend(fontsize=7, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def write_figures(
    folder: str | Path,
    held: Mapping[str, np.ndarray],
    reconstructions: np.ndarray,
    modalities: Sequence[str],
    *,
    table: RetrievalTable | None = None,
    similarities: Mapping[str, np.ndarray] | None = None,
    log_history: Sequence[Mapping[str, float]] = (),
    times: Sequence[datetime] | None = None,
    support: np.ndarray | None = None,
    limb: bool = True,
    note: str = "",
) -> list[Path]:
    """Writes all figures of a run as PNG files.

    Args:
        folder: Where to.
        held: `pixel_values` (N, M, S, S) and `observed` (N, M) of held-out observations in time order.
        reconstructions: (K, M, S, S) the model's for K observations spread evenly over them.
        modalities: The M names.
        table: Retrieval of the network and of its controls.
        similarities: Panels of `similarity_figure`.
        log_history: `trainer.state.log_history`.
        times: N times of the observations.
        support: As in `reconstruction_figure`.
        limb: As in `reconstruction_figure`.
        note: Put into every title, as what the data are.

    Returns:
        The files written.
    """
    folder, written = Path(folder), []
    tail = f" ({note})" if note else ""
    for number, index in enumerate(spread(len(held["pixel_values"]), len(reconstructions))):
        when = f"{times[index]:%Y-%m-%d %H:%M}" if times is not None else f"observation {index}"
        figure = reconstruction_figure(
            held["pixel_values"][index],
            reconstructions[number],
            modalities,
            observed=held["observed"][index],
            support=support,
            limb=limb,
            title=f"Reconstruction, {when}{tail}",
        )
        written.append(save_figure(figure, folder / f"reconstruction_{number}.png"))
    if similarities:
        figure = similarity_figure(similarities, times=times, title=f"Similarity of all with all{tail}")
        written.append(save_figure(figure, folder / "similarity.png"))
    if table is not None and table.rows:
        figure = retrieval_figure(table, title=f"Retrieval of the co-temporal image{tail}")
        written.append(save_figure(figure, folder / "retrieval.png"))
    if any(term in entry for entry in log_history for term in TERMS):
        figure = training_curves(log_history, title=f"Terms of the objective{tail}")
        written.append(save_figure(figure, folder / "training.png"))
    return written


def spread(count: int, wanted: int) -> list[int]:
    """Indices of `wanted` of `count` things, evenly spread; fewer where there are fewer."""
    wanted = min(count, wanted)
    return [int((position + 0.5) * count / wanted) for position in range(wanted)]


__all__ = [
    "colormap",
    "draw_limb",
    "new_figure",
    "reconstruction_figure",
    "retrieval_figure",
    "save_figure",
    "similarity_figure",
    "spread",
    "training_curves",
    "write_figures",
]
