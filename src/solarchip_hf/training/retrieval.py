"""Cross-modal retrieval: does the embedding of a magnetogram find the EUV image of the same time?

Everything here works on embeddings and similarity matrices, never on models. The gallery is the held-out observations
in time order; a query is an image of one modality, its partner the co-temporal image of the other. Two similarities:
the cosine of the class tokens, and the sum over patches of the cosines of patch tokens at the same place.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..models.geometry import disk_fraction


def class_similarity(queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """Cosine of class tokens, all pairs.

    Args:
        queries: (Q, P) class tokens of one modality.
        gallery: (G, P) class tokens of the other.

    Returns:
        (Q, G) float32.
    """
    return F.normalize(queries.float(), dim=-1) @ F.normalize(gallery.float(), dim=-1).T


def patch_similarity(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    patch_mask: torch.Tensor | None = None,
    *,
    max_elements: int = 2**26,
) -> torch.Tensor:
    """Mean over patches of the cosine between tokens at the same place, all pairs.

    The order is that of the sum over patches; the mean keeps the value within -1..1.

    Args:
        queries: (Q, L, P) patch tokens of one modality.
        gallery: (G, L, P) patch tokens of the other.
        patch_mask: (L,) bool, the patches that count; None counts all.
        max_elements: Bound on the elements of a float32 working copy; patches are summed in slices below it.

    Returns:
        (Q, G) float32.

    Raises:
        ValueError: The shapes do not fit, or no patch is left.
    """
    if queries.ndim != 3 or gallery.ndim != 3 or queries.shape[1:] != gallery.shape[1:]:
        raise ValueError(f"patch tokens: expected (Q, L, P) and (G, L, P), got {queries.shape} and {gallery.shape}.")
    length, width = queries.shape[1:]
    keep = torch.arange(length) if patch_mask is None else torch.as_tensor(patch_mask).nonzero()[:, 0].cpu()
    if not len(keep):
        raise ValueError("patch_mask: expected at least one patch to count, got none. Lower min_disk_fraction.")
    step = max(1, max_elements // (width * max(len(queries), len(gallery))))
    total = torch.zeros(len(queries), len(gallery), device=queries.device)
    for start in range(0, len(keep), step):
        index = keep[start : start + step].to(queries.device)
        left = F.normalize(queries[:, index].float(), dim=-1).flatten(1)
        right = F.normalize(gallery[:, index].float(), dim=-1).flatten(1)
        total += left @ right.T  # the sum over patches of inner products is one inner product of all of them
    return total / len(keep)


def partner_ranks(similarity: torch.Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many gallery images come before, and how many tie with, each query's partner (the diagonal).

    Args:
        similarity: (N, N), finite; rows are queries.

    Returns:
        `before` (N,) int, images strictly more similar than the partner; `ties` (N,) int, other images exactly as
        similar.

    Raises:
        ValueError: The matrix is not square, or not finite.
    """
    matrix = np.asarray(similarity, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"similarity: expected a square matrix with partners on the diagonal, got {matrix.shape}.")
    if not np.isfinite(matrix).all():
        raise ValueError("similarity: expected finite values, got NaN or infinity. Leave missing images out first.")
    partner = np.diagonal(matrix)[:, None]
    return (matrix > partner).sum(1), (matrix == partner).sum(1) - 1


def recall_at(k: int, before: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """Probability that the partner is among the first k, ties broken at random: (N,) within 0..1.

    Constant embeddings therefore score chance, not success.
    """
    return np.clip((k - before) / (ties + 1), 0.0, 1.0)


def bootstrap_interval(
    values: np.ndarray, *, block: int = 1, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Interval of a mean over queries in time order, by the circular block bootstrap (Politis and Romano, 1992).

    Args:
        values: (N,) one figure a query, in time order.
        block: Queries a block; neighbours in time are alike, so that single queries would understate the width.
        level: Coverage.
        resamples: Number of resamples.
        seed: Of the resampling.

    Returns:
        Lower and upper bound.
    """
    values = np.asarray(values, dtype=np.float64)
    count = len(values)
    block = max(1, min(block, count))
    random = np.random.default_rng(seed)
    starts = random.integers(0, count, size=(resamples, math.ceil(count / block)))
    index = (starts[..., None] + np.arange(block)).reshape(resamples, -1)[:, :count] % count
    tail = (1 - level) / 2
    low, high = np.quantile(values[index].mean(1), [tail, 1 - tail])
    return float(low), float(high)


def retrieval_scores(
    similarity: torch.Tensor | np.ndarray, *, block: int = 1, resamples: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Scores of one similarity matrix, both directions averaged.

    Args:
        similarity: (N, N); rows are queries of the first modality, columns of the second, in time order.
        block: Queries a block of the bootstrap.
        resamples: Resamples of the bootstrap.
        seed: Of the resampling.

    Returns:
        `recall@1`, `recall@5`, `median_rank` (1 is best), `recall@1_low` and `recall@1_high` (95% interval),
        `recall@1_forward` (rows find columns), `recall@1_backward`, `chance@1`, `chance@5`, `gallery`.
    """
    matrix = np.asarray(similarity, dtype=np.float64)
    directions = [partner_ranks(matrix), partner_ranks(matrix.T)]
    first = [recall_at(1, *direction) for direction in directions]
    fifth = [recall_at(5, *direction) for direction in directions]
    ranks = [1 + before + ties / 2 for before, ties in directions]
    low, high = bootstrap_interval((first[0] + first[1]) / 2, block=block, resamples=resamples, seed=seed)
    count = len(matrix)
    return {
        "recall@1": float(np.mean(first)),
        "recall@1_low": low,
        "recall@1_high": high,
        "recall@5": float(np.mean(fifth)),
        "median_rank": float(np.mean([np.median(rank) for rank in ranks])),
        "recall@1_forward": float(first[0].mean()),
        "recall@1_backward": float(first[1].mean()),
        "chance@1": 1.0 / count,
        "chance@5": min(1.0, 5.0 / count),
        "gallery": count,
    }


@dataclass
class RetrievalTable:
    """Retrieval of several methods on one gallery, a row a method and pair of modalities.

    Attributes:
        rows: Each with `method`, `pair` (`"hmi / aia171"`), and the keys of `retrieval_scores`.
        title: Said above the table.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    title: str = "Cross-modal retrieval of the co-temporal image"

    def add(self, method: str, pair: tuple[str, str], scores: dict[str, float]) -> None:
        """Appends one row."""
        self.rows.append({"method": method, "pair": " / ".join(pair), **scores})

    def methods(self) -> list[str]:
        """Methods in the order in which they were added."""
        return list(dict.fromkeys(row["method"] for row in self.rows))

    def mean(self, method: str, key: str = "recall@1") -> float:
        """Mean of a score over the pairs of a method; NaN if the method has no row."""
        values = [row[key] for row in self.rows if row["method"] == method]
        return float(np.mean(values)) if values else math.nan

    def cells(self) -> list[list[str]]:
        """Header and rows as text: one row a method and pair, then the mean over pairs where there are several."""
        lines = [["method", "pair", "recall@1", "95% interval", "recall@5", "median rank", "chance@1", "gallery"]]
        for method in self.methods():
            rows = [row for row in self.rows if row["method"] == method]
            for row in rows:
                lines.append(
                    [
                        method,
                        row["pair"],
                        f"{row['recall@1']:.3f}",
                        f"{row['recall@1_low']:.2f} to {row['recall@1_high']:.2f}",
                        f"{row['recall@5']:.3f}",
                        f"{row['median_rank']:.1f}",
                        f"{row['chance@1']:.3f}",
                        str(row["gallery"]),
                    ]
                )
            if len(rows) > 1:
                means = [f"{self.mean(method, key):.3f}" for key in ("recall@1", "recall@5", "chance@1")]
                rank = f"{self.mean(method, 'median_rank'):.1f}"
                lines.append([method, "mean over pairs", means[0], "", means[1], rank, means[2], ""])
        return lines

    def to_text(self) -> str:
        """The table with aligned columns, for a terminal."""
        lines = self.cells()
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        text = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, text[0], "  ".join("-" * width for width in widths), *text[1:]])

    def to_markdown(self) -> str:
        """The table in Markdown."""
        head, *body = self.cells()
        rule = ["---", "---"] + ["---:"] * (len(head) - 2)
        return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])

    def to_json(self) -> str:
        """Title and rows as JSON."""
        return json.dumps(asdict(self), indent=2)


def retrieval_pairs(modalities: Sequence[str], anchor: str | None = None) -> list[tuple[int, int]]:
    """Index pairs (anchor, other); every unordered pair if the anchor is None or not among the modalities."""
    names = list(modalities)
    if anchor in names:
        first = names.index(anchor)
        return [(first, other) for other in range(len(names)) if other != first]
    return [(first, second) for first in range(len(names)) for second in range(first + 1, len(names))]


def patch_disk_mask(length: int, size: int, min_disk_fraction: float) -> torch.Tensor | None:
    """Patches that count in retrieval, as in the patch term: (length,) bool, or None where all do.

    Args:
        length: Number of patch tokens, a square number.
        size: Pixels a side of the image.
        min_disk_fraction: Least share of solar disk in a patch.
    """
    grid = math.isqrt(length)
    if min_disk_fraction <= 0 or grid * grid != length or size % grid:
        return None
    return torch.from_numpy(disk_fraction(size, grid).reshape(-1) >= min_disk_fraction)


def cross_modal_retrieval(
    embeds: torch.Tensor,
    observed: torch.Tensor,
    modalities: Sequence[str],
    *,
    anchor: str | None = None,
    patch_mask: torch.Tensor | None = None,
    prefix: str = "",
    block: int = 1,
    resamples: int = 1000,
    seed: int = 0,
    table: RetrievalTable | None = None,
) -> RetrievalTable:
    """Retrieval by class token and by the sum of patch similarities, for every pair with the anchor.

    Args:
        embeds: (N, M, 1 + L, P) projections of the held-out observations in time order, the class token first.
        observed: (N, M) bool; an observation counts for a pair where both of its modalities are there.
        modalities: The M names.
        anchor: The modality that all others are paired with; None for all pairs.
        patch_mask: (L,) bool, the patches that count.
        prefix: Put before the method's name, as `"untrained "`.
        block: Queries a block of the bootstrap.
        resamples: Resamples of the bootstrap.
        seed: Of the resampling.
        table: Table to append to; None starts one.

    Returns:
        The table. A pair with fewer than two observations is left out.

    Raises:
        ValueError: The shapes do not fit.
    """
    if embeds.ndim != 4 or embeds.shape[:2] != observed.shape or embeds.shape[1] != len(modalities):
        raise ValueError(
            f"embeds and observed: expected (N, {len(modalities)}, 1 + L, P) and (N, {len(modalities)}), "
            f"got {tuple(embeds.shape)} and {tuple(observed.shape)}."
        )
    table = table if table is not None else RetrievalTable()
    for kind in ("class token", "patch similarity"):
        for first, second in retrieval_pairs(modalities, anchor):
            both = (observed[:, first] & observed[:, second]).cpu()
            if both.sum() < 2:
                continue
            left, right = embeds[both, first], embeds[both, second]
            if kind == "class token":
                similarity = class_similarity(left[:, 0], right[:, 0])
            else:
                similarity = patch_similarity(left[:, 1:], right[:, 1:], patch_mask)
            scores = retrieval_scores(similarity.cpu(), block=block, resamples=resamples, seed=seed)
            table.add(prefix + kind, (modalities[first], modalities[second]), scores)
    return table


__all__ = [
    "RetrievalTable",
    "bootstrap_interval",
    "class_similarity",
    "cross_modal_retrieval",
    "partner_ranks",
    "patch_disk_mask",
    "patch_similarity",
    "recall_at",
    "retrieval_pairs",
    "retrieval_scores",
]
