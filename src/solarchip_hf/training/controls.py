"""Controls for cross-modal retrieval: what is reached without having learnt anything.

Three questions, each answered on the gallery of the trained network and in the same table. How far does the geometry
of the day (apparent radius and tilt of the solar axis) lead? How far an untrained network of the same shape? And how
far the plain fact that a bright region sits where the field is strong?
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from ..models.geometry import PLATE_SCALE_1024, RSUN_PIXELS_1024, disk_fraction, disk_mask
from ..models.modalities import MODALITIES, resolve_modality
from .collator import SolarChipDataCollator
from .retrieval import RetrievalTable, cross_modal_retrieval, patch_disk_mask, retrieval_pairs, retrieval_scores

logger = logging.getLogger(__name__)

GRID = 8  # cells a side of the activity maps


def geometry_similarity(
    rsun_arcsec: np.ndarray,
    b0: np.ndarray,
    *,
    size: int,
    resolution: float = 0.1,
    other_rsun_arcsec: np.ndarray | None = None,
    other_b0: np.ndarray | None = None,
) -> np.ndarray:
    """Similarity of observations by what their headers say of the geometry: apparent radius and B0.

    At full precision both are clocks, equal for all instruments of one spacecraft; a network can only know them as far
    as they show in the image. Both are therefore rounded to what a displacement of `resolution` pixels resolves: the
    radius of a disk drawn at a fixed plate scale, and the shift of the disk's centre under a change of B0. Equal
    values tie, and ties are broken at random by the scores.

    Args:
        rsun_arcsec: (N,) apparent solar radius of the queries, arcsec.
        b0: (N,) heliographic latitude of the observer of the queries, degrees.
        size: Pixels a side of the images.
        resolution: Displacement in pixels that counts as seen.
        other_rsun_arcsec: (N,) the same of the gallery's modality; None means one value an observation.
        other_b0: (N,) likewise.

    Returns:
        (N, N), at most zero: minus the squared distance in resolved steps.
    """
    scale = PLATE_SCALE_1024 * 1024 / size
    radius_step = resolution * scale
    tilt_step = np.degrees(resolution / (RSUN_PIXELS_1024 * size / 1024))

    def steps(radius: np.ndarray, tilt: np.ndarray) -> np.ndarray:
        pair = [np.asarray(radius, dtype=np.float64) / radius_step, np.asarray(tilt, dtype=np.float64) / tilt_step]
        return np.round(np.stack(pair, axis=1))

    query = steps(rsun_arcsec, b0)
    gallery = steps(
        rsun_arcsec if other_rsun_arcsec is None else other_rsun_arcsec, b0 if other_b0 is None else other_b0
    )
    return -((query[:, None] - gallery[None]) ** 2).sum(-1)


def activity_maps(
    images: np.ndarray, *, signed: bool, mean: float = 0.0, std: float = 1.0, grid: int = GRID
) -> np.ndarray:
    """Coarse maps of activity: the mean over the cells of a grid of |B|, or of EUV brightness, each in its logarithm.

    Args:
        images: (N, S, S) z-scored signed logarithms of the field (G) or of the brightness (DN).
        signed: Whether the quantity has a sign, which is then dropped.
        mean: Mean of the z-score.
        std: Deviation of the z-score.
        grid: Cells a side.

    Returns:
        (N, C) for the C cells that are disk by a quarter or more, each cell's mean over the gallery subtracted.

    Raises:
        ValueError: The size is no multiple of the grid.
    """
    images = np.asarray(images, dtype=np.float32)
    size = images.shape[-1]
    if size % grid:
        raise ValueError(f"activity maps: expected an image size divisible by {grid}, got {size}.")
    # an exact zero is fill: it must not turn into |mean| of a signed field
    values = np.where(images == 0, 0.0, np.abs(images * std + mean)) if signed else images
    values = values * disk_mask(size)  # the corona off the limb has no counterpart in a magnetogram
    cell = size // grid
    maps = values.reshape(len(values), grid, cell, grid, cell).mean((2, 4)).reshape(len(values), -1)
    maps = maps[:, np.asarray(disk_fraction(size, grid)).reshape(-1) >= 0.25]
    # what all maps share (limb brightening, the disk) says nothing of the day: the control is stronger without it
    return maps - maps.mean(0)


def correlation_similarity(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Pearson correlation of maps, all pairs: (Q, C) and (G, C) to (Q, G)."""

    def unit(maps: np.ndarray) -> np.ndarray:
        centred = maps - maps.mean(1, keepdims=True)
        return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)

    return unit(queries) @ unit(gallery).T


def add_controls(
    table: RetrievalTable,
    pixel_values: np.ndarray,
    observed: np.ndarray,
    modalities: Sequence[str],
    *,
    anchor: str | None = None,
    statistics: dict[str, Any] | None = None,
    rsun_arcsec: np.ndarray | None = None,
    b0: np.ndarray | None = None,
    block: int = 1,
    seed: int = 0,
) -> RetrievalTable:
    """Appends header geometry and activity maps to a table, on the gallery of the embeddings.

    Args:
        table: Table with the network's rows.
        pixel_values: (N, M, S, S) scaled held-out images in time order.
        observed: (N, M) bool.
        modalities: The M names.
        anchor: As in `cross_modal_retrieval`.
        statistics: The image processor's statistics, for undoing the z-score.
        rsun_arcsec: (N,) apparent radius; None or all NaN leaves the geometry out.
        b0: (N,) degrees; likewise.
        block: Queries a block of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        The same table. Images whose size 8 does not divide have no activity maps.
    """
    pixel_values, observed = np.asarray(pixel_values), np.asarray(observed, dtype=bool)
    size = pixel_values.shape[-1]
    entries = (statistics or {}).get("modalities", {})
    known = np.zeros(len(observed), dtype=bool)
    if rsun_arcsec is not None and b0 is not None:
        known = np.isfinite(np.asarray(rsun_arcsec, dtype=float)) & np.isfinite(np.asarray(b0, dtype=float))
    for first, second in retrieval_pairs(modalities, anchor):
        both = observed[:, first] & observed[:, second]
        pair = (modalities[first], modalities[second])
        if both.sum() < 2:
            continue
        if known[both].all():
            matrix = geometry_similarity(np.asarray(rsun_arcsec)[both], np.asarray(b0)[both], size=size)
            table.add("header geometry (R, B0)", pair, retrieval_scores(matrix, block=block, seed=seed))
        if size % GRID:
            logger.warning("no activity maps: %d cells a side do not divide %d pixels", GRID, size)
            continue
        maps = []
        for index in (first, second):
            name = modalities[index]
            entry = entries.get(name, {})
            maps.append(
                activity_maps(
                    pixel_values[both, index],
                    signed=MODALITIES[resolve_modality(name)].signed,
                    mean=float(entry.get("mean", 0.0)),
                    std=float(entry.get("std", 1.0)),
                )
            )
        scores = retrieval_scores(correlation_similarity(*maps), block=block, seed=seed)
        table.add("8 x 8 activity maps", pair, scores)
    order = table.methods()
    table.rows.sort(key=lambda row: order.index(row["method"]))  # stable: one method after the other
    return table


def untrained_copy(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """A network of the same configuration with other, untrained weights, in evaluation mode.

    Args:
        model: A `PreTrainedModel`.
        seed: Of the weights; the caller's random state is left as it was.

    Returns:
        A new model on the CPU.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return type(model)._from_config(copy.deepcopy(model.config)).eval()


def batches_of(dataset: Any, batch_size: int, limit: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
    """The first observations of a map-style dataset in order, collated.

    Args:
        dataset: Items with `pixel_values` and `observed`.
        batch_size: Observations a batch.
        limit: Observations in all; None takes every one.
    """
    collate = SolarChipDataCollator()
    count = len(dataset) if limit is None else min(limit, len(dataset))
    for start in range(0, count, batch_size):
        yield collate([dataset[index] for index in range(start, min(start + batch_size, count))])


def spread_over(dataset: Any, count: int) -> Subset:
    """Some observations of a map-style dataset, evenly over its whole span, as the trained network saw all of it."""
    return Subset(dataset, np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist())


@torch.no_grad()
def embed_observations(
    model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]], *, keep_pixels: bool = True
) -> dict[str, torch.Tensor]:
    """Runs observations through a model in evaluation mode, without the loss.

    Args:
        model: A `SolarChipForPreTraining`; batches are moved to its device.
        batches: Each with `pixel_values` (B, M, S, S) and `observed` (B, M).
        keep_pixels: Whether to return the images too; 256 of eleven channels at 1024 px are 12 GB.

    Returns:
        On the CPU: `embeds` (N, M, 1 + L, P), `observed` (N, M) and, if asked for, `pixel_values` (N, M, S, S).
    """
    device = next(model.parameters()).device
    model.eval()
    parts: dict[str, list[torch.Tensor]] = {"embeds": [], "observed": []}
    if keep_pixels:
        parts["pixel_values"] = []
    for batch in batches:
        outputs = model(**{name: value.to(device) for name, value in batch.items()}, return_loss=False)
        parts["embeds"].append(outputs.contrastive_embeds.float().cpu())
        parts["observed"].append(batch["observed"])
        if keep_pixels:
            parts["pixel_values"].append(batch["pixel_values"])
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


@torch.no_grad()
def settle_statistics(model: torch.nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> torch.nn.Module:
    """Lets a model's running statistics take their values on some batches, without learning.

    The untrained network is then centred on training data as the trained one is: the comparison is of weights alone.

    Args:
        model: A `SolarChipForPreTraining`; returned in evaluation mode. Batches are moved to its device. Other
            processes need not take part: see `gather_negatives` of its configuration.
        batches: Each with `pixel_values` and `observed`.
    """
    device = next(model.parameters()).device
    model.eval()
    for batch in batches:
        # without the loss, whose counts are taken over all processes
        outputs = model(**{name: value.to(device) for name, value in batch.items()}, return_loss=False)
        model.solarchip.update_centering(outputs.projections, batch["observed"].to(device))
    return model


def compare_with_controls(
    model: torch.nn.Module,
    gallery: Any,
    training: Any = None,
    *,
    statistics: dict[str, Any] | None = None,
    metadata: Any = None,
    limit: int = 256,
    batch_size: int = 16,
    block: int = 1,
    seed: int = 0,
    title: str = "Cross-modal retrieval of the co-temporal image among held-out observations",
) -> tuple[RetrievalTable, dict[str, torch.Tensor]]:
    """The network, the untrained network, header geometry and activity maps on one gallery, in one table.

    Args:
        model: A `SolarChipForPreTraining`.
        gallery: Held-out observations in time order, map-style.
        training: Training observations, by which the untrained network's running statistics settle; None leaves them.
        statistics: The image processor's, for undoing the z-score in the activity maps.
        metadata: A table with `rsun_arcsec` and `b0`, a row an observation of the gallery; None leaves the header
            geometry out.
        limit: Most observations of the gallery.
        batch_size: Observations a forward pass.
        block: Queries a block of the bootstrap.
        seed: Of the untrained weights and the bootstrap.
        title: Of the table.

    Returns:
        The table, and what `embed_observations` gave for the trained model.
    """
    config = model.config
    anchor = config.anchor_modality if config.pairing == "anchor" else None
    held = embed_observations(model, batches_of(gallery, batch_size, limit))
    mask = patch_disk_mask(held["embeds"].shape[2] - 1, held["pixel_values"].shape[-1], config.min_disk_fraction)
    options = {"anchor": anchor, "patch_mask": mask, "block": block, "seed": seed}
    table = RetrievalTable(title=title)
    cross_modal_retrieval(held["embeds"], held["observed"], config.modalities, table=table, **options)

    control = untrained_copy(model, seed + 1).to(next(model.parameters()).device)
    control.config.gather_negatives = False  # other processes need not take part
    if training is not None and config.projection_centering != "none":
        settle_statistics(control, batches_of(spread_over(training, 8 * batch_size), batch_size))
    untrained = embed_observations(control, batches_of(gallery, batch_size, limit), keep_pixels=False)
    cross_modal_retrieval(
        untrained["embeds"], held["observed"], config.modalities, table=table, prefix="untrained ", **options
    )
    facts = {}
    if metadata is not None:
        facts = {name: metadata[name].to_numpy(dtype=float)[:limit] for name in ("rsun_arcsec", "b0")}
    add_controls(
        table,
        held["pixel_values"].numpy(),
        held["observed"].numpy(),
        config.modalities,
        anchor=anchor,
        statistics=statistics,
        block=block,
        seed=seed,
        **facts,
    )
    return table, held


__all__ = [
    "activity_maps",
    "add_controls",
    "batches_of",
    "compare_with_controls",
    "correlation_similarity",
    "embed_observations",
    "geometry_similarity",
    "settle_statistics",
    "spread_over",
    "untrained_copy",
]
