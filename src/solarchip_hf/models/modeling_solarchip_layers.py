"""What both kinds of tower share: modality vectors, running centring, and the way of a mixed batch through towers."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from .distributed import world_size


class SolarChipInitialization:
    """Mixin for models whose `_init_weights` uses the functions of `transformers.initialization` throughout.

    For "custom code" transformers passes over every module without parameters of its own, lest an initialisation that
    ignores its marks should overwrite loaded weights. Ours and CLIP's set some weights from the module above, with
    deviations that depend on depth and width; they would silently keep the general 0.02 instead.
    """

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: `_init_weights` respects what was loaded."""
        return False


class SolarChipModalityEmbedding(nn.Module):
    """A learned vector for every modality of a tower, one parameter a name, so that a subset loads by its names."""

    def __init__(self, modalities: Sequence[str], width: int):
        super().__init__()
        self.modalities = tuple(modalities)
        for name in self.modalities:
            self.register_parameter(name, nn.Parameter(torch.zeros(width)))

    def forward(self, tower_ids: torch.LongTensor) -> torch.Tensor:
        """(n,) positions within the tower's modalities -> (n, width)."""
        return torch.stack([getattr(self, name) for name in self.modalities])[tower_ids]


class SolarChipCentering(nn.Module):
    """Running mean and deviation of one modality's projections, by which inference centres.

    Args:
        num_tokens: 1 for the class token alone, or 1+L for every position by itself.
        projection_dim: Width of the contrastive space.
    """

    def __init__(self, num_tokens: int, projection_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_tokens, projection_dim))
        self.register_buffer("std", torch.ones(num_tokens, projection_dim))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, mean: torch.Tensor, std: torch.Tensor, count: torch.Tensor, momentum: float) -> None:
        """Mixes in the statistics of a batch: a plain average at first, then with weight `momentum`.

        Args:
            mean: (num_tokens, projection) of the observed images of the batch, over all processes; of another grid of
                patches too.
            std: As `mean`.
            count: () number of those images; fewer than two say nothing of a deviation and change nothing.
            momentum: Least weight of the newest batch.
        """
        if len(mean) != len(self.mean):
            mean, std = (_resize_tokens(table, len(self.mean) - 1) for table in (mean, std))
        enough = count > 1  # stays on the device: a batch without the modality costs no synchronisation
        weight = (1 / (self.num_updates + 1)).clamp(min=momentum) * enough
        self.mean.lerp_(mean.to(self.mean), weight.to(self.mean))
        self.std.lerp_(std.to(self.std), weight.to(self.std))
        self.num_updates.add_(enough)

    def statistics(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation, (1, projection) or (num_tokens, projection), resized to another grid where need be."""
        if len(self.mean) in (1, num_tokens):
            return self.mean, self.std
        return _resize_tokens(self.mean, num_tokens - 1), _resize_tokens(self.std, num_tokens - 1)


def _resize_tokens(table: torch.Tensor, num_patches: int) -> torch.Tensor:
    """(1+L, c) of one square grid -> (1+num_patches, c) of another, bilinearly; the class row stays."""
    old, new = round((len(table) - 1) ** 0.5), round(num_patches**0.5)
    grid = table[1:].T.reshape(1, -1, old, old)
    grid = nn.functional.interpolate(grid, size=(new, new), mode="bilinear", align_corners=False)
    return torch.cat([table[:1], grid.reshape(-1, new * new).T])


def check_pixel_values(pixel_values: torch.Tensor, patch_size: int) -> None:
    """Raises a ValueError unless `pixel_values` is (N, 1, H, H) with H a multiple of `patch_size`."""
    shape = tuple(pixel_values.shape)
    if len(shape) != 4 or shape[1] != 1 or shape[2] != shape[3] or shape[2] % patch_size or 0 in shape:
        raise ValueError(
            f"pixel_values: expected (N, 1, H, H) with H a multiple of {patch_size}, got {shape}. "
            "Let SolarChipImageProcessor prepare the images."
        )


def _concatenate(parts: list, order: torch.Tensor | None):
    """Joins what the towers gave (tensors, tuples of them, or None), row by row in the batch's order."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], tuple):
        return tuple(_concatenate(list(level), order) for level in zip(*parts, strict=True))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined if order is None else joined[order]


def _first_rows(value, count: int):
    if isinstance(value, tuple):
        return tuple(level[:count] for level in value)
    return None if value is None else value[:count]


def _join_modalities(parts: list, order: list[int], batch: int):
    """As `_concatenate`, where the rows of each part are `batch` observations times some modalities."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], tuple):
        return tuple(_join_modalities(list(level), order, batch) for level in zip(*parts, strict=True))
    if order == sorted(order):
        if len(parts) == 1:
            return parts[0]
        return torch.cat([part.unflatten(0, (batch, -1)) for part in parts], dim=1).flatten(0, 1)
    columns = [column for part in parts for column in part.unflatten(0, (batch, -1)).unbind(1)]
    return torch.stack([columns[order.index(modality)] for modality in range(len(order))], dim=1).flatten(0, 1)


def _run_observations(
    towers: Mapping[str, list[str]],
    modalities: Sequence[str],
    inputs: torch.Tensor,
    run: Callable[[str, torch.Tensor, torch.Tensor], Mapping],
) -> dict:
    """`run_towers` for whole observations, every modality in order: slices, whose backward costs a copy and no scatter.

    No tower is without rows then.
    """
    batch = len(inputs) // len(modalities)
    stacked = inputs.unflatten(0, (batch, len(modalities)))  # (B, M, ...)
    parts, order = [], []
    for tower, served in towers.items():
        where = [modalities.index(name) for name in served]
        first, last = where[0], where[-1] + 1
        rows = stacked[:, first:last] if where == list(range(first, last)) else stacked[:, where]
        tower_ids = torch.arange(len(where), device=inputs.device).repeat(batch)
        parts.append(run(tower, rows.flatten(0, 1), tower_ids))
        order.extend(where)
    return {key: _join_modalities([part[key] for part in parts], order, batch) for key in parts[0]}


def run_towers(
    towers: Mapping[str, list[str]],
    modalities: Sequence[str],
    ids: Sequence[int],
    inputs: torch.Tensor,
    run: Callable[[str, torch.Tensor, torch.Tensor], Mapping],
) -> dict:
    """Sends the rows of a mixed batch to their towers and puts the outputs back into the batch's order.

    Every tower runs, in the same order on every process, whenever a gradient or another process may wait for it: one
    without rows gets one image of zeros, whose outputs are cut to no rows, so that its parameters get gradients of
    exactly zero (DDP) and its collectives take place (FSDP).

    Args:
        towers: Names of the towers with the modalities that each serves.
        modalities: The modalities that `ids` index.
        ids: Modality of each of the N rows.
        inputs: (N, ...) images or latents.
        run: Called with the tower's name, its rows (n, ...) and their positions (n,) within the tower's modalities;
            gives tensors (n, ...), tuples of such, or None, by name.

    Returns:
        The same names with N rows each.

    Raises:
        ValueError: There are no rows.
    """
    if not len(inputs):
        raise ValueError(f"inputs: expected at least one image, got {tuple(inputs.shape)}.")
    if list(ids) == list(range(len(modalities))) * (len(inputs) // len(modalities)):
        return _run_observations(towers, modalities, inputs, run)
    run_idle = torch.is_grad_enabled() or world_size() > 1
    parts, order = [], []
    for tower, served in towers.items():
        positions = {modalities.index(name): position for position, name in enumerate(served)}
        rows = [row for row, index in enumerate(ids) if index in positions]
        if not rows and not run_idle:
            continue
        if not rows:
            images, tower_ids = torch.zeros_like(inputs[:1]), [0]
        else:
            images = inputs if len(rows) == len(inputs) else inputs[torch.tensor(rows, device=inputs.device)]
            tower_ids = [positions[ids[row]] for row in rows]
        output = run(tower, images, torch.tensor(tower_ids, device=inputs.device))
        parts.append({key: _first_rows(value, len(rows)) for key, value in output.items()})
        order.extend(rows)
    back = None
    if order != sorted(order):
        back = torch.tensor(order, device=inputs.device).argsort()
    return {key: _concatenate([part[key] for part in parts], back) for key in parts[0]}


__all__ = [
    "SolarChipCentering",
    "SolarChipInitialization",
    "SolarChipModalityEmbedding",
    "check_pixel_values",
    "run_towers",
]
