"""The strongest simple baseline of translation: a U-Net that regresses the target with an absolute error.

It gives one smooth image and no spread. Source of the comparison: Park et al. 2019, ApJL 884, L23, where a plain
absolute error beats the adversarial loss in pixel correlation.
"""

import copy
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

from .translation_cases import TranslationCases

if TYPE_CHECKING:
    from ..data.observations import Observations

logger = logging.getLogger(__name__)

FACTS = "translation.json"
# Beyond this side, squares of pixels become channels: the network works at 64 px, which keeps a laptop in time.
INNER_SIZE = 64


class UNetTranslator(nn.Module):
    """A diffusers `UNet2DModel` from scaled source images to the scaled target, without noise or time.

    Args:
        unet: The network; its channels are the pixels of a square, times the number of sources.
        source_modalities: The channels that are given, in order.
        target_modality: The channel that is told.
        statistics_key: What the processor's statistics belong to; predictions for others are refused.

    Attributes:
        training_key: What it was trained with, as the function `training_key` tells; kept with the
            weights. Empty before training.
    """

    def __init__(
        self,
        unet: Any,  # UNet2DModel, whose type diffusers' lazy names hide
        source_modalities: Sequence[str],
        target_modality: str,
        statistics_key: dict[str, Any],
    ):
        super().__init__()
        self.unet: Any = unet
        self.source_modalities = tuple(source_modalities)
        self.target_modality = target_modality
        self.statistics_key = dict(statistics_key)
        self.training_key: dict[str, Any] = {}
        self.square = int(self.unet.config.out_channels**0.5)

    @classmethod
    def build(
        cls,
        source_modalities: Sequence[str],
        target_modality: str,
        statistics_key: dict[str, Any],
        *,
        widths: Sequence[int] = (16, 32, 64),
        layers_per_block: int = 1,
    ) -> "UNetTranslator":
        """A translator with random weights.

        Args:
            source_modalities: The channels that are given, in order.
            target_modality: The channel that is told.
            statistics_key: `processor.statistics_key` of the data; its `size` sets the network's.
            widths: Channels of each resolution, from the finest.
            layers_per_block: Residual blocks a resolution.

        Raises:
            ValueError: The size cannot be halved so often.
        """
        size = statistics_key["size"]
        square = max(1, size // INNER_SIZE)
        if size % (square * 2 ** (len(widths) - 1)):
            raise ValueError(
                f"widths: expected a size that {len(widths) - 1} halvings of {size // square} px divide, got {size} px "
                f"for {tuple(widths)}; take fewer widths."
            )
        levels = len(widths)
        unet = UNet2DModel(
            sample_size=size // square,
            in_channels=len(source_modalities) * square**2,
            out_channels=square**2,
            layers_per_block=layers_per_block,
            block_out_channels=tuple(widths),
            down_block_types=("DownBlock2D",) * levels,
            up_block_types=("UpBlock2D",) * levels,
            norm_num_groups=8,
            add_attention=False,
        )
        return cls(unet, source_modalities, target_modality, statistics_key)

    def forward(self, sources: torch.Tensor) -> torch.Tensor:
        """Predicts the target.

        Args:
            sources: (B, S, H, H) scaled images in the order of `source_modalities`.

        Returns:
            (B, H, H) scaled images.
        """
        folded = functional.pixel_unshuffle(sources, self.square)
        predicted = self.unet(folded, torch.zeros(len(sources), device=sources.device)).sample
        return functional.pixel_shuffle(predicted, self.square)[:, 0]

    @torch.no_grad()
    def predict(self, cases: TranslationCases, *, batch_size: int = 16) -> np.ndarray:
        """Translates held-out observations.

        Args:
            cases: Of the same modalities and settings as the training data.
            batch_size: Images a step.

        Returns:
            (N, H, H) float32 in physical units.

        Raises:
            ValueError: Modalities or settings differ.
        """
        ours = self.source_modalities, self.target_modality, self.statistics_key
        theirs = cases.source_modalities, cases.target_modality, cases.processor.statistics_key
        if ours != theirs:
            raise ValueError(f"cases: expected {ours}, which the U-Net was trained for, got {theirs}. Train it anew.")
        device = next(self.parameters()).device
        self.eval()
        parts = [self(cases.sources[part].to(device)).float().cpu() for part in cases.batches(batch_size)]
        return cases.to_physical(torch.cat(parts))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the weights (safetensors), the network's configuration and `translation.json`."""
        folder = Path(folder)
        (folder / FACTS).unlink(missing_ok=True)  # written last, they never describe other weights
        self.unet.save_pretrained(folder)
        facts = {
            "source_modalities": list(self.source_modalities),
            "target_modality": self.target_modality,
            "statistics_key": self.statistics_key,
            "training_key": self.training_key,
        }
        partial = folder / f"{FACTS}.partial"
        partial.write_text(json.dumps(facts, indent=2), encoding="utf-8")
        os.replace(partial, folder / FACTS)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "UNetTranslator":
        """Loads what `save_pretrained` wrote.

        Raises:
            FileNotFoundError: There is no such folder.
        """
        path = Path(folder) / FACTS
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: expected the folder of a trained U-Net, got none with {FACTS}.")
        facts = json.loads(path.read_text(encoding="utf-8"))
        unet = UNet2DModel.from_pretrained(folder, use_safetensors=True)
        translator = cls(unet, facts["source_modalities"], facts["target_modality"], facts["statistics_key"])
        translator.training_key = facts.get("training_key", {})
        return translator


def training_key(
    training: "Observations", source_modalities: Sequence[str], target_modality: str, **settings: Any
) -> dict[str, Any]:
    """What a trained U-Net depends on; one with another key must not stand in for it.

    Args:
        training: The observations that it learns from.
        source_modalities: The channels that are given, in order.
        target_modality: The channel that is told.
        **settings: Of network and training, JSON-able: widths, steps, seed.

    Returns:
        JSON-able: channels, settings and a SHA-256 of the dataset's files, rows and statistics.
    """
    digest = hashlib.sha256(training.metadata[["shard", "row"]].to_numpy(dtype=np.int64).tobytes())
    digest.update("".join(map(str, training.metadata["time_nominal"])).encode())
    processor = training.processor
    for part in (training.manifest["shards"], processor.statistics_key, processor.statistics):
        digest.update(json.dumps(part, sort_keys=True).encode())
    channels = {"source_modalities": list(source_modalities), "target_modality": target_modality}
    return {**channels, **settings, "observations": digest.hexdigest()}


def train_unet(
    translator: UNetTranslator,
    training: "Observations",
    validation: "Observations | None" = None,
    *,
    num_steps: int = 300,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    eval_every: int = 50,
    patience: int = 3,
    max_validation: int = 64,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> list[dict[str, float]]:
    """Trains a translator in place with the mean absolute error of scaled images, and keeps the best weights.

    Args:
        translator: The network.
        training: Observations to learn from; those without a source or the target are left out.
        validation: Observations to stop by, from another time than those that will be scored; None: the last weights
            are kept.
        num_steps: Most optimisation steps.
        batch_size: Images a step.
        learning_rate: At the start; it falls to zero by a cosine.
        eval_every: Steps between validations.
        patience: Validations without a better one before the training stops.
        max_validation: Observations that a validation looks at.
        seed: Of the order of the images. The initial weights are the caller's.
        device: Where to train.
        progress: Whether to show a bar.

    Returns:
        A row each validation (or each `eval_every` steps): `step`, `loss`, `validation_loss`.

    Raises:
        ValueError: No complete observation.
    """
    names = [*translator.source_modalities, translator.target_modality]
    columns = [training.modalities.index(name) for name in names]
    training = _complete(training, columns)
    if validation is not None:
        validation = _complete(validation, columns)
        step = max(1, -(-len(validation) // max_validation))
        validation = validation.select(np.arange(0, len(validation), step))
    support = training.processor.support(translator.target_modality)
    weight = torch.ones(()) if support is None else torch.from_numpy(np.array(support)).float()
    weight = (weight / weight.mean()).to(device)
    loader = DataLoader(
        training,
        batch_size=min(batch_size, len(training)),
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )

    def loss_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        pixels = batch["pixel_values"][:, columns].to(device)
        return (weight * (translator(pixels[:, :-1]) - pixels[:, -1]).abs()).mean()

    def validate(held_out: "Observations") -> float:
        translator.eval()
        with torch.no_grad():
            parts = [(loss_of(batch).item(), len(batch["observed"])) for batch in DataLoader(held_out, batch_size)]
        translator.train()
        losses, counts = zip(*parts, strict=True)
        return float(np.average(losses, weights=counts))

    translator.to(device).train()
    optimiser = torch.optim.AdamW(translator.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps)
    history: list[dict[str, float]] = []
    best, weights, waited, recent = float("inf"), None, 0, []
    bar = tqdm(total=num_steps, desc="U-Net", disable=not progress)
    batches = iter(loader)
    for step in range(1, num_steps + 1):
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        loss = loss_of(batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(translator.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        recent.append(loss.item())
        bar.update()
        if step % eval_every and step != num_steps:
            continue
        row = {"step": step, "loss": float(np.mean(recent))}
        recent = []
        if validation is not None:
            row["validation_loss"] = validate(validation)
            bar.set_postfix(validation=f"{row['validation_loss']:.4f}")
            waited += 1
            if row["validation_loss"] < best:
                best, waited = row["validation_loss"], 0
                weights = copy.deepcopy(translator.state_dict())
        history.append(row)
        if waited >= patience:
            logger.info("U-Net: no better validation since step %d, stopping at %d.", step - waited * eval_every, step)
            break
    bar.close()
    if weights is not None:
        translator.load_state_dict(weights)
    translator.eval()
    return history


def _complete(observations: "Observations", columns: list[int]) -> "Observations":
    chosen = observations.select(observations.observed[:, columns].all(axis=1))
    if not len(chosen):
        names = ", ".join(observations.modalities[column] for column in columns)
        raise ValueError(f"observations: expected some with all of {names}, got none of {len(observations)}.")
    return chosen


__all__ = ["UNetTranslator", "train_unet", "training_key"]
