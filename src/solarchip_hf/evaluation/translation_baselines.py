"""What a translation has to beat: predictions made without it, and the ceiling that its autoencoder sets.

All of them are (N, H, H) float32 in physical units, for the N held-out observations of `TranslationCases`. Models and
pipelines are passed in.
"""

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from ..models.modalities import MODALITIES
from .translation_cases import TranslationCases
from .translation_fidelity.fidelity_scores import northern_leaders
from .translation_fidelity.image_scores import RADIUS_SHARE, radial_distance
from .translation_fidelity.magnetogram_scores import STRONG_FIELD, hale_polarity

if TYPE_CHECKING:
    from ..data.observations import Observations

logger = logging.getLogger(__name__)


def training_mean(observations: "Observations", modality: str, *, progress: bool = False) -> np.ndarray:
    """Mean image of the training part, in physical units.

    Args:
        observations: The training part of a prepared dataset.
        modality: The channel.
        progress: Whether to show a bar.

    Returns:
        (H, H) float32; NaN where no image is valid.

    Raises:
        ValueError: No observation has the channel.
    """
    total, count = np.zeros(()), np.zeros(())
    for index in tqdm(range(len(observations)), desc="training mean", disable=not progress):
        image = observations.physical(index)[modality]
        if image is not None:
            valid = np.isfinite(image)
            total = total + np.where(valid, image, 0).astype(np.float64)
            count = count + valid
    if not np.any(count):
        raise ValueError(f"observations: expected some with {modality}, got none of {len(observations)}.")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


def mean_radial_profile(image: np.ndarray) -> np.ndarray:
    """An image without structure: the mean of `image` in rings a pixel wide about the disk's centre.

    Args:
        image: (H, H) on the canonical grid.

    Returns:
        (H, H) float32; NaN in rings without a valid pixel.
    """
    ring = np.floor(radial_distance(len(image)) * RADIUS_SHARE * len(image)).astype(np.int64)
    valid = np.isfinite(image)
    length = int(ring.max()) + 1
    total = np.bincount(ring[valid], weights=image[valid].astype(np.float64), minlength=length)
    count = np.bincount(ring[valid], minlength=length)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)[ring].astype(np.float32)


def other_days(observations: "Observations", modality: str, count: int, *, seed: int = 0) -> np.ndarray:
    """Images of other days, drawn from the training part: as sharp and as lifelike as images can be, and wrong.

    Args:
        observations: The training part of a prepared dataset.
        modality: The channel.
        count: How many are wanted.
        seed: Of the draw.

    Returns:
        (count, H, H) float32.

    Raises:
        ValueError: No observation has the channel.
    """
    there = np.flatnonzero(observations.observed[:, observations.modalities.index(modality)])
    if not len(there):
        raise ValueError(f"observations: expected some with {modality}, got none of {len(observations)}.")
    chosen = np.random.default_rng(seed).choice(there, size=count, replace=count > len(there))
    return np.stack([np.asarray(observations.physical(int(index))[modality], dtype=np.float32) for index in chosen])


def hale_magnetograms(cases: TranslationCases) -> np.ndarray:
    """The strong field of the truth with the signs of Hale's law, zero elsewhere.

    It sees the truth's strength, which no translation does, and shows how far place alone tells the sign.

    Args:
        cases: Held-out magnetograms.

    Returns:
        (N, H, H) float32 in gauss.
    """
    facts = zip(cases.truth, northern_leaders(list(cases.times)), cases.b0, strict=True)
    signs = np.stack([hale_polarity(image, northern_leader=sign, b0=b0) for image, sign, b0 in facts])
    strength = np.abs(cases.truth)
    # Polarity reaches beyond the strong pixels of a region; the weak field there is no part of this rival.
    return (strength * signs * (strength > STRONG_FIELD)).astype(np.float32)


@torch.no_grad()
def autoencoder_ceiling(autoencoder: Any, cases: TranslationCases, *, batch_size: int = 16) -> np.ndarray:
    """The truth, encoded and decoded: no translation through these latents can be expected to do better.

    Args:
        autoencoder: A `SolarChipForPreTraining` that has the target.
        cases: Held-out observations.
        batch_size: Images a step.

    Returns:
        (N, H, H) float32 in physical units.
    """
    position = list(autoencoder.config.modalities).index(cases.target_modality)
    images = []
    for part in cases.batches(batch_size):
        pixels = cases.target[part, None].to(autoencoder.device, autoencoder.dtype)
        ids = [position] * len(pixels)
        images.append(autoencoder.decode(autoencoder.encode(pixels, ids), ids)[:, 0].float().cpu())
    return cases.to_physical(torch.cat(images))


def sample_pipeline(
    pipeline: Any,
    cases: TranslationCases,
    *,
    num_samples: int = 8,
    num_inference_steps: int = 20,
    guidance_scale: float = 1.0,
    batch_size: int = 16,
    seed: int = 0,
    unconditional: bool = False,
) -> np.ndarray:
    """What a pipeline draws for the held-out observations, or what its prior draws when it sees no source.

    Args:
        pipeline: A `SolarChipControlNetPipeline`.
        cases: Held-out observations of its sources.
        num_samples: Samples an observation.
        num_inference_steps: Of the pipeline's scheduler.
        guidance_scale: Weight of the sources.
        batch_size: Samples that are denoised together; they do not depend on it.
        seed: Of the noise; every sample has a generator of its own.
        unconditional: Whether to leave the ControlNet out.

    Returns:
        (N, num_samples, H, H) float32 in physical units.
    """
    names = enumerate(cases.source_modalities)
    sources = [cases.processor.unscale(cases.sources[:, index], name) for index, name in names]
    output = pipeline(
        np.stack(sources, axis=1),
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        num_samples=num_samples,
        generator=[torch.Generator().manual_seed(seed + index) for index in range(len(cases) * num_samples)],
        output_type="np",
        batch_size=batch_size,
        controlnet_conditioning_scale=0.0 if unconditional else 1.0,
    )
    return output.samples


def simple_baselines(
    training: "Observations", cases: TranslationCases, *, seed: int = 0, progress: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The baselines without a network.

    Args:
        training: The training part of the dataset.
        cases: Held-out observations.
        seed: Of the draw of other days.
        progress: Whether to show a bar.

    Returns:
        Name to (N, H, H) predictions, and name to what a reader has to know of them. For a magnetogram the zero field,
        Hale's law and the truth with its sign reversed stand among them.
    """
    target = cases.target_modality
    mean = training_mean(training, target, progress=progress)
    predictions = {
        "training mean": np.broadcast_to(mean, cases.truth.shape),
        "mean radial profile": np.broadcast_to(mean_radial_profile(mean), cases.truth.shape),
        "another day": other_days(training, target, len(cases), seed=seed),
    }
    remarks = {"another day": "images of the training part, drawn at random."}
    if MODALITIES[target].signed:
        predictions |= {
            "zero field": np.broadcast_to(_nothing(cases), cases.truth.shape),
            "Hale's law": hale_magnetograms(cases),
            "flipped truth": -cases.truth,
        }
        remarks["Hale's law"] = "the true strength above 100 G with the signs of Hale's law; it sees the truth."
        remarks["flipped truth"] = "the truth with its sign reversed."
    return predictions, remarks


def _nothing(cases: TranslationCases) -> np.ndarray:
    """(H, H) zeros, NaN beyond the target's support."""
    support = cases.processor.support(cases.target_modality)
    return np.where(True if support is None else support, np.float32(0), np.float32(np.nan))


class LatentRegression:
    """A linear map from the sources' latents to the target's, the same at every place: translation without a network.

    Source and target are encoded by the same pretrained autoencoder, so that this shows how much of the task its
    latents have solved already.

    Args:
        autoencoder: A `SolarChipForPreTraining` that has sources and target.
        ridge: Weight of the penalty, relative to the mean variance of the inputs.
    """

    def __init__(self, autoencoder: Any, *, ridge: float = 1e-3):
        self.autoencoder = autoencoder
        self.ridge = ridge
        self.weight: torch.Tensor | None = None  # (1 + S z, z)

    @torch.no_grad()
    def _encode(self, pixels: torch.Tensor, modality: str) -> torch.Tensor:
        """(B, H, H) scaled images to (B, h, w, z) latents."""
        position = list(self.autoencoder.config.modalities).index(modality)
        pixels = pixels[:, None].to(self.autoencoder.device, self.autoencoder.dtype)
        return self.autoencoder.encode(pixels, [position] * len(pixels)).movedim(1, -1).float().cpu()

    def _inputs(self, sources: torch.Tensor, modalities: tuple[str, ...]) -> torch.Tensor:
        """(B, S, H, H) scaled sources to (B, h, w, 1 + S z) latents behind a one."""
        latents = [self._encode(sources[:, index], name) for index, name in enumerate(modalities)]
        return torch.cat([torch.ones_like(latents[0][..., :1]), *latents], dim=-1)

    def fit(self, cases: TranslationCases, *, batch_size: int = 16) -> "LatentRegression":
        """Fits the map by least squares on training observations; returns itself."""
        gram, moment = torch.zeros(()), torch.zeros(())
        for part in cases.batches(batch_size):
            inputs = self._inputs(cases.sources[part], cases.source_modalities).flatten(0, 2).double()
            targets = self._encode(cases.target[part], cases.target_modality).flatten(0, 2).double()
            gram, moment = gram + inputs.T @ inputs, moment + inputs.T @ targets
        penalty = torch.full((len(gram),), float(gram.diagonal()[1:].mean()) * self.ridge, dtype=torch.float64)
        penalty[0] = 0  # the mean is free
        self.weight = torch.linalg.solve(gram + penalty.diag(), moment).float()
        return self

    @torch.no_grad()
    def predict(self, cases: TranslationCases, *, batch_size: int = 16) -> np.ndarray:
        """(N, H, H) float32 in physical units."""
        if self.weight is None:
            raise ValueError("weight: expected a fitted regression, got none; call fit() first.")
        model, images = self.autoencoder, []
        position = list(model.config.modalities).index(cases.target_modality)
        for part in cases.batches(batch_size):
            latents = (self._inputs(cases.sources[part], cases.source_modalities) @ self.weight).movedim(-1, 1)
            decoded = model.decode(latents.to(model.device, model.dtype), [position] * len(latents))
            images.append(decoded[:, 0].float().cpu())
        return cases.to_physical(torch.cat(images))


__all__ = [
    "LatentRegression",
    "autoencoder_ceiling",
    "hale_magnetograms",
    "mean_radial_profile",
    "other_days",
    "sample_pipeline",
    "simple_baselines",
    "training_mean",
]
