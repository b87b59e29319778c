"""Features of a frozen backbone, computed once, and the head that learns on them."""

import copy
import logging
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from ..models.configuration_solarchip import SolarChipConfig
from ..models.modeling_solarchip import SolarChipModel
from ..models.modeling_solarchip_classification import SolarChipForImageClassification, classification_loss
from ..models.modeling_solarchip_outputs import SolarChipImageClassifierOutput
from .collator import SolarChipDataCollator

logger = logging.getLogger(__name__)

# A statistic that varies less than this between days, beside tokens of unit variance, is noise.
_LEAST_DEVIATION = 1e-3
_AT_A_TIME = 32  # observations whose tokens are in memory for their statistics


class FlareDataCollator(SolarChipDataCollator):
    """Stacks labelled observations, or frozen features, to a batch."""

    def __call__(self, observations: Any) -> dict[str, torch.Tensor]:
        """Stacks.

        Args:
            observations: Items of `FlareObservations` or `FrozenFeatures`.

        Returns:
            What `SolarChipDataCollator` gives, or the stacked features; and `labels` (B,) int64.

        Raises:
            ValueError: An observation without its label, or as in `SolarChipDataCollator`.
        """
        if observations and "tokens" in observations[0]:
            return torch.utils.data.default_collate(list(observations))
        batch = super().__call__(observations)
        if any("labels" not in observation for observation in observations):
            raise ValueError("observations: expected labels, got none. Join them with label_observations.")
        labels = [torch.as_tensor(observation["labels"]) for observation in observations]
        return {**batch, "labels": torch.stack(labels).long()}


class FrozenFeatures(Dataset):
    """What a frozen backbone makes of labelled observations.

    Attributes:
        tokens: (N, M, 1+L, hidden) float32.
        contrastive: (N, M, projection) float32, the class tokens in the contrastive space.
        observed: (N, M) bool.
        classes: (N,) int64 labels.
        times: (N,) nominal slots, or None where the observations had none.
    """

    def __init__(
        self, tokens: torch.Tensor, contrastive: torch.Tensor, observed: torch.Tensor, classes: Any, times: Any = None
    ):
        self.tokens, self.contrastive, self.observed = tokens, contrastive, observed
        self.classes = np.asarray(classes, dtype=np.int64)
        self.times = times

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "tokens": self.tokens[index],
            "contrastive": self.contrastive[index],
            "observed": self.observed[index],
            "labels": torch.tensor(self.classes[index]),
        }

    def select(self, indices: Any) -> "FrozenFeatures":
        """The features of some of the observations (positions, or a mask)."""
        indices = np.asarray(indices)
        rows = np.flatnonzero(indices) if indices.dtype == bool else indices.astype(np.int64)
        part = copy.copy(self)
        part.tokens, part.contrastive, part.observed = (
            values[torch.from_numpy(rows)] for values in (self.tokens, self.contrastive, self.observed)
        )
        part.classes = self.classes[rows]
        part.times = None if self.times is None else self.times[rows]
        return part


def features_gib(config: SolarChipConfig, count: int) -> float:
    """Memory in GiB that the features of so many observations take."""
    tokens = 1 + (config.image_size // config.patch_size) ** 2
    return count * len(config.modalities) * (tokens * config.hidden_size + config.projection_dim) * 4 / 2**30


@torch.no_grad()
def _encode(
    backbone: SolarChipModel, pixel_values: torch.Tensor, observed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, M, H, H), (B, M) bool -> tokens (B, M, 1+L, hidden), class tokens in the contrastive space."""
    images = torch.where(observed[:, :, None, None], pixel_values, 0.0).flatten(0, 1)[:, None]
    encoded = backbone(images, list(range(observed.shape[1])) * len(observed), return_dict=True)
    return (
        encoded.last_hidden_state.unflatten(0, observed.shape),
        encoded.contrastive_embeds[:, 0].unflatten(0, observed.shape),
    )


@torch.no_grad()
def encode_observations(
    model: SolarChipForImageClassification,
    dataset: Any,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    device: Any = None,
    progress: bool = True,
) -> FrozenFeatures:
    """Runs the backbone once over labelled observations, in evaluation mode and without augmentation.

    Features depend on the backbone alone: heads of any kind and seed, and any share of the labels
    (`features.select(...)`), can be fitted on the same features.

    Args:
        model: The classifier.
        dataset: `FlareObservations`, or any dataset whose items have `pixel_values` (M, N, N), `observed` and `labels`.
        batch_size: Observations at a time.
        num_workers: Processes that load.
        device: Where to compute; by default where the model is.
        progress: Whether to show a bar.

    Returns:
        The features, on the CPU.
    """
    device = next(model.parameters()).device if device is None else torch.device(device)
    training = model.training
    model.eval().to(device)
    loader = DataLoader(
        dataset, batch_size, num_workers=num_workers, collate_fn=FlareDataCollator(model.config.modalities)
    )
    tokens: torch.Tensor | None = None
    contrastive: torch.Tensor | None = None
    observed, classes, done = [], [], 0
    for batch in tqdm(loader, desc="features", unit="batch", disable=not progress):
        seen = batch["observed"]
        encoded = _encode(model.solarchip, batch["pixel_values"].to(device), seen.to(device))
        ours, theirs = (values.float().cpu() for values in encoded)
        if tokens is None or contrastive is None:  # once as a whole: joining parts would need twice the memory
            tokens, contrastive = (v.new_empty((len(dataset), *v.shape[1:])) for v in (ours, theirs))
        tokens[done : done + len(seen)], contrastive[done : done + len(seen)] = ours, theirs
        done += len(seen)
        observed.append(seen)
        classes.append(batch["labels"])
    model.train(training)
    if tokens is None or contrastive is None:
        raise ValueError("dataset: expected at least one observation, got none.")
    return FrozenFeatures(
        tokens, contrastive, torch.cat(observed), torch.cat(classes).numpy(), getattr(dataset, "times", None)
    )


class FlareProbe(nn.Module):
    """The head of a classifier by itself, on frozen features or behind the frozen backbone. It shares parameters.

    While it learns it may see standardised statistics: what differs between days is small beside what all days share,
    and unstandardised the shared part governs every step. He et al. (2022, arXiv 2111.06377, appendix A) put a
    normalisation without parameters before a linear probe for that reason. Being linear, it is absorbed by the
    classifier's projections: `standardize` rewrites them so that the logits stay, `fold` rewrites them back, and the
    saved model knows nothing of it.

    Args:
        model: The classifier.
        images: Whether batches are observations, to be encoded anew every time.
    """

    def __init__(self, model: SolarChipForImageClassification, *, images: bool = False):
        super().__init__()
        self.config = model.config
        self.classifier = model.classifier
        if images:
            self.solarchip = model.solarchip
        shape = (len(self.config.modalities), 2 * self.config.hidden_size)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("deviation", torch.ones(shape))
        self.to(next(model.parameters()).device)

    def standardize(self, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        """Learns on `(statistics - mean) / deviation` from now on. Until `fold`, use the classifier through this alone.

        Args:
            mean: (M, 2 hidden), as `pooled_statistics` gives it.
            deviation: The same shape, positive.
        """
        self._rewrite(mean.to(self.mean), deviation.to(self.deviation))

    def fold(self) -> None:
        """Puts the standardisation into the classifier's projections, which then stand by themselves."""
        self._rewrite(torch.zeros_like(self.mean), torch.ones_like(self.deviation))

    @torch.no_grad()
    def _rewrite(self, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        for index, name in enumerate(self.config.modalities):
            layer = self.classifier.token_projections[name]
            raw = layer.weight / self.deviation[index]
            layer.bias += raw @ (mean[index] - self.mean[index])
            layer.weight.copy_(raw * deviation[index])
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)

    def forward(
        self,
        observed: torch.Tensor,
        tokens: torch.Tensor | None = None,
        contrastive: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> SolarChipImageClassifierOutput:
        """What the classifier gives for the images of these features, or for these images.

        Args:
            observed: (B, M) bool.
            tokens: (B, M, 1+L, hidden).
            contrastive: (B, M, projection).
            labels: (B,) classes, -1 where unknown.
            pixel_values: (B, M, H, H), with `images=True` and in place of `tokens` and `contrastive`.

        Returns:
            `loss`, where labels are given, and `logits` (B, K).
        """
        if pixel_values is not None:
            tokens, contrastive = _encode(self.solarchip, pixel_values, observed)
        pooled = (self.classifier.pool(tokens)[0] - self.mean) / self.deviation  # (B, M, 2 hidden)
        ids = list(range(observed.shape[1])) * len(observed)
        features = self.classifier.project(pooled.flatten(0, 1), contrastive.flatten(0, 1), ids)
        logits, _ = self.classifier(features.unflatten(0, observed.shape), observed)
        loss = None
        if labels is not None:
            loss = classification_loss(
                logits,
                labels,
                class_weights=self.config.class_weights,
                focal_gamma=self.config.focal_gamma,
                gather=self.training,
            )
        return SolarChipImageClassifierOutput(loss=loss, logits=logits)


@torch.no_grad()
def pooled_statistics(
    model: SolarChipForImageClassification, dataset: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation, over observations, of what the head's projections read: by what a probe standardises.

    Args:
        model: The classifier.
        dataset: `FrozenFeatures`, or observations, which are encoded some at a time and not kept.
        **options: As for `encode_observations`.

    Returns:
        Both (M, 2 hidden), on the CPU; 0 and 1 for a modality that fewer than two observations have. A deviation is at
        least 0.001.
    """
    pool = copy.deepcopy(model.classifier).cpu().eval().pool
    parts, observed = [], []
    for start in range(0, len(dataset), _AT_A_TIME):
        rows = range(start, min(start + _AT_A_TIME, len(dataset)))
        if isinstance(dataset, FrozenFeatures):
            features = dataset.select(list(rows))
        else:
            features = encode_observations(model, Subset(dataset, rows), **{**options, "progress": False})
        parts.append(pool(features.tokens)[0])
        observed.append(features.observed)
    pooled, seen = torch.cat(parts), torch.cat(observed)
    mean, deviation = torch.zeros_like(pooled[0]), torch.ones_like(pooled[0])
    for index in range(pooled.shape[1]):
        values = pooled[seen[:, index], index]
        if len(values) > 1:
            mean[index], deviation[index] = values.mean(0), values.std(0).clamp_min(_LEAST_DEVIATION)
    return mean, deviation


__all__ = [
    "FlareDataCollator",
    "FlareProbe",
    "FrozenFeatures",
    "encode_observations",
    "features_gib",
    "pooled_statistics",
]
