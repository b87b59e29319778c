"""Features of a frozen backbone, computed once, and the head that learns on them."""

import copy
import logging
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..models.configuration_solarchip import SolarChipConfig
from ..models.modeling_solarchip_classification import SolarChipForImageClassification, classification_loss
from ..models.modeling_solarchip_outputs import SolarChipImageClassifierOutput
from .collator import SolarChipDataCollator

logger = logging.getLogger(__name__)


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
    many = len(model.config.modalities)
    tokens: torch.Tensor | None = None
    contrastive: torch.Tensor | None = None
    observed, classes, done = [], [], 0
    for batch in tqdm(loader, desc="features", unit="batch", disable=not progress):
        seen = batch["observed"]
        images = torch.where(seen[:, :, None, None], batch["pixel_values"], 0.0).to(device)
        encoded = model.solarchip(images.flatten(0, 1)[:, None], list(range(many)) * len(seen), return_dict=True)
        ours = encoded.last_hidden_state.unflatten(0, seen.shape).float().cpu()
        theirs = encoded.contrastive_embeds[:, 0].unflatten(0, seen.shape).float().cpu()
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
    """The head of a classifier by itself, on frozen features. It shares the classifier's parameters.

    Args:
        model: The classifier.
    """

    def __init__(self, model: SolarChipForImageClassification):
        super().__init__()
        self.config = model.config
        self.classifier = model.classifier

    def forward(
        self,
        tokens: torch.Tensor,
        contrastive: torch.Tensor,
        observed: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> SolarChipImageClassifierOutput:
        """What the classifier gives for the images of these features.

        Args:
            tokens: (B, M, 1+L, hidden).
            contrastive: (B, M, projection).
            observed: (B, M) bool.
            labels: (B,) classes, -1 where unknown.

        Returns:
            `loss`, where labels are given, and `logits` (B, K).
        """
        ids = list(range(observed.shape[1])) * len(observed)
        features, _ = self.classifier.image_features(tokens.flatten(0, 1), contrastive.flatten(0, 1), ids)
        logits, _ = self.classifier(features.unflatten(0, observed.shape), observed)
        loss = None
        if labels is not None:
            loss = classification_loss(
                logits, labels, class_weights=self.config.class_weights, focal_gamma=self.config.focal_gamma
            )
        return SolarChipImageClassifierOutput(loss=loss, logits=logits)


__all__ = ["FlareDataCollator", "FlareProbe", "FrozenFeatures", "encode_observations", "features_gib"]
