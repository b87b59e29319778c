"""The networks and schedulers of the translation: a prior over latents, a ControlNet on it, and how they are fed.

Source of the method: SolarCHIP (arXiv 2511.22958). Latents are those of SolarCHIP's autoencoder, normalised per channel
with the statistics of the training set. The prior learns the latents of the targets and sees no source: its context is
always one zero token. The ControlNet sees the sources' normalised latents twice: laid over each other as a hint on the
latent grid, and token by token (the class tokens too) as its context.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SchedulerMixin,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from ..models.configuration_solarchip import SolarChipConfig
from ..models.settings import choice

logger = logging.getLogger(__name__)

# Widths of the prior. "published" is that of arXiv 2511.22958 (latents 32 x 32 of 32 channels): attention with 8 heads
# at all resolutions but the lowest. "small" trains on a laptop; a base width of None is the latents' own, 64 at least.
PRIOR_SIZES: Mapping[str, Mapping[str, Any]] = {
    "published": {"base_width": 320, "multipliers": (1, 2, 4, 4), "layers_per_block": 2, "num_heads": 8},
    "small": {"base_width": None, "multipliers": (1, 2, 2), "layers_per_block": 1, "num_heads": 4},
}

# Noise from nearly none to nearly all: the betas of latent diffusion, linear in their square root.
_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    # From the last step of the training on, whatever the number of steps: "leading" would start at 951 of 1000 with 20
    # steps, where training images still show through the noise.
    "timestep_spacing": "trailing",
    # Latents have unit deviation but no bounds: nothing is clipped. Schedulers that never clip keep the word in their
    # configuration, so that DDIM made from it, by diffusers' own from_config, does not fall back on clipping.
    "clip_sample": False,
}
_SCHEDULERS: dict[str, type[SchedulerMixin]] = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "unipc": UniPCMultistepScheduler,
    "dpm++": DPMSolverMultistepScheduler,
}
SCHEDULERS: tuple[str, ...] = tuple(_SCHEDULERS)
PREDICTION_TYPES = ("epsilon", "v_prediction")


def latent_shape(config: SolarChipConfig, image_size: int | None = None) -> tuple[int, int, int]:
    """Shape (z, h, w) of one image's latent.

    Args:
        config: The autoencoder's configuration.
        image_size: Pixels of the image on a side; None: what the autoencoder is made for.

    Raises:
        ValueError: The size is not a multiple of the autoencoder's patch.
    """
    size = config.image_size if image_size is None else image_size
    if size % config.patch_size:
        raise ValueError(
            f"image_size: expected a multiple of {config.patch_size} (pixels of the autoencoder's latent pixel), got "
            f"{size}."
        )
    side = size // config.patch_size
    return config.backbone_config.latent_channels, side, side


def build_prior(
    shape: Sequence[int],
    *,
    size: str = "small",
    token_width: int | None = None,
    prior_modalities: Sequence[str] | None = None,
    base_width: int | None = None,
    multipliers: Sequence[int] | None = None,
    layers_per_block: int | None = None,
    num_heads: int | None = None,
) -> UNet2DConditionModel:
    """Builds the network of the unconditional prior, with random weights.

    All resolutions but the lowest attend over space and to the context. A network narrower than the latents cannot
    carry their noise from its first convolution to its last and is warned about; the wide tokens of a ViT want a base
    width of their own size and small multipliers.

    Args:
        shape: (z, h, w) of a latent, as `latent_shape` gives it.
        size: `"published"` or `"small"`, a row of `PRIOR_SIZES`.
        token_width: Width of SolarCHIP's tokens, which the ControlNet will attend to; None: z, as in both towers.
        prior_modalities: The modalities that one prior serves, told apart by a learned vector each; with one or None,
            the prior knows a single target.
        base_width: Channels of the first resolution.
        multipliers: Width of every resolution in base widths; each but the last is followed by a halving.
        layers_per_block: Residual blocks a resolution.
        num_heads: Attention heads, everywhere.

    Returns:
        The prior; its `config.sample_size` is the side of the latent.

    Raises:
        ValueError: The widths or halvings do not fit the latent.
    """
    channels, side, _ = shape
    preset = PRIOR_SIZES[choice("size", size, tuple(PRIOR_SIZES))]
    multipliers = tuple(preset["multipliers"] if multipliers is None else multipliers)
    heads = preset["num_heads"] if num_heads is None else num_heads
    base = preset["base_width"] if base_width is None else base_width
    if base is None:
        base = max(64, 32 * math.ceil(channels / 32))
    _check_widths(shape, base, multipliers, heads)
    if base < channels:
        logger.warning(
            "base_width: %d channels cannot carry the noise of %d latent channels through the prior; take as many, and "
            "smaller multipliers.",
            base,
            channels,
        )
    levels = len(multipliers)
    known = [] if prior_modalities is None else list(prior_modalities)
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(base * factor for factor in multipliers),
        layers_per_block=preset["layers_per_block"] if layers_per_block is None else layers_per_block,
        down_block_types=(*("CrossAttnDownBlock2D",) * (levels - 1), "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (levels - 1)),
        attention_head_dim=heads,  # diffusers' name for the number of heads
        norm_num_groups=math.gcd(32, base),
        cross_attention_dim=channels if token_width is None else token_width,
        num_class_embeds=len(known) if len(known) > 1 else None,
    )


def _check_widths(shape: Sequence[int], base: int, multipliers: tuple[int, ...], heads: int) -> None:
    channels, height, width = shape
    if height != width or channels < 1:
        raise ValueError(f"shape: expected (z, h, h) of a square image's latent, got {tuple(shape)}.")
    if base < 1 or not multipliers or min(multipliers) < 1:
        raise ValueError(f"multipliers: expected whole numbers from 1 on, got {multipliers} with base_width {base}.")
    halvings = 2 ** (len(multipliers) - 1)
    if height % halvings:
        raise ValueError(
            f"multipliers: expected a latent side that {len(multipliers) - 1} halvings divide, got {height} for "
            f"{multipliers}; take fewer multipliers."
        )
    uneven = [base * factor for factor in multipliers if heads < 1 or base * factor % heads]
    if uneven:
        raise ValueError(f"num_heads: expected a divisor of every width, got {heads} for {uneven or base}.")


def build_controlnet(
    unet: UNet2DConditionModel, hint_channels: int, *, hint_width: int | None = None
) -> ControlNetModel:
    """Builds the ControlNet of a prior: its encoder copied, a hint encoder for latents, zero outputs.

    The hint encoder is a convolution, SiLU and a zero convolution at stride 1, since the hint lies on the latent grid
    already. Until it is trained, the ControlNet changes nothing of what the prior predicts.

    Args:
        unet: The prior.
        hint_channels: Channels of the hint: z times the number of sources.
        hint_width: Channels between the two convolutions of the hint encoder; None: the prior's first width.

    Returns:
        A `ControlNetModel` whose weights are a copy, not shared with the prior.
    """
    width = unet.config.block_out_channels[0] if hint_width is None else hint_width
    return ControlNetModel.from_unet(
        unet, conditioning_channels=hint_channels, conditioning_embedding_out_channels=(width,)
    )


def build_scheduler(name: str = "unipc", *, prediction_type: str = "epsilon") -> SchedulerMixin:
    """Builds a noise scheduler with the method's 1000 steps and betas.

    Args:
        name: `"unipc"` or `"dpm++"` (20 steps do), `"ddim"` (as published, 100 steps), or `"ddpm"` (training).
        prediction_type: What the network predicts: `"epsilon"` (published) or `"v_prediction"`.

    Returns:
        The scheduler. All of them add the same noise and read the same networks.

    Raises:
        ValueError: Unknown name or prediction type.
    """
    scheduler_class = _SCHEDULERS[choice("scheduler", name, SCHEDULERS)]
    choice("prediction_type", prediction_type, PREDICTION_TYPES)
    return scheduler_class.from_config({**_DIFFUSION, "prediction_type": prediction_type})


def null_context(
    unet: UNet2DConditionModel | ControlNetModel, batch: int, device: torch.device | None = None
) -> torch.Tensor:
    """The context that says nothing, one zero token: (batch, 1, token width) in the network's dtype.

    On the network's device, unless another is named, as for a network whose weights are offloaded.
    """
    where = unet.device if device is None else device
    return torch.zeros(batch, 1, unet.config.cross_attention_dim, dtype=unet.dtype, device=where)


def _channel_statistics(
    statistics: Mapping[str, Sequence[float]], modality: str, latents: torch.Tensor
) -> torch.Tensor:
    if modality not in statistics:
        known = ", ".join(statistics)
        raise ValueError(f"latent statistics: expected an entry for {modality!r}, got {known or 'none'}.")
    values = torch.as_tensor(statistics[modality], dtype=torch.float32, device=latents.device)
    if values.shape != (latents.shape[-3],):
        raise ValueError(
            f"latent statistics of {modality!r}: expected {latents.shape[-3]} numbers, one a latent channel, got "
            f"{tuple(values.shape)}."
        )
    return values[:, None, None]


def normalise_latents(
    latents: torch.Tensor,
    modality: str,
    mean: Mapping[str, Sequence[float]],
    std: Mapping[str, Sequence[float]],
) -> torch.Tensor:
    """Latents of one modality with mean 0 and deviation 1 a channel over the training set.

    Args:
        latents: (..., z, h, w) as the autoencoder's `encode` gives them.
        modality: Their channel.
        mean: Means of the z channels by modality.
        std: Deviations of the z channels by modality, positive.

    Returns:
        (..., z, h, w) in the dtype of `latents`.

    Raises:
        ValueError: There are no statistics of the modality, or not z of them.
    """
    shift, scale = (_channel_statistics(table, modality, latents) for table in (mean, std))
    return ((latents.float() - shift) / scale).to(latents.dtype)


def denormalise_latents(
    latents: torch.Tensor,
    modality: str,
    mean: Mapping[str, Sequence[float]],
    std: Mapping[str, Sequence[float]],
) -> torch.Tensor:
    """The inverse of `normalise_latents`: (..., z, h, w) as the autoencoder's `decode` takes them."""
    shift, scale = (_channel_statistics(table, modality, latents) for table in (mean, std))
    return (latents.float() * scale + shift).to(latents.dtype)


def condition_on_sources(
    latents: torch.Tensor,
    class_tokens: torch.Tensor,
    source_modalities: Sequence[str],
    mean: Mapping[str, Sequence[float]],
    std: Mapping[str, Sequence[float]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a ControlNet is given of the sources: the hint and the context.

    A dropped hint, for classifier-free guidance, is zeros in both: a context of zero tokens is, whatever their number,
    the null context (attention gives the mean of zero values).

    Args:
        latents: (B, S, z, h, w) latents of the S sources as the autoencoder's `encode` gives them.
        class_tokens: (B, S, z) their class tokens (`pooler_output`).
        source_modalities: The S channels, in the order of the second axis.
        mean: Means of the z latent channels by modality.
        std: Deviations of the z latent channels by modality.

    Returns:
        The hint (B, S z, h, w), normalised latents source after source, and the context (B, S (1 + h w), z), each
        source's class token and patch tokens (the latent's pixels), normalised too.

    Raises:
        ValueError: The number of sources differs, or statistics are missing.
    """
    if latents.shape[1] != len(source_modalities) or class_tokens.shape[:2] != latents.shape[:2]:
        raise ValueError(
            f"latents: expected (B, {len(source_modalities)}, z, h, w) for {', '.join(source_modalities)} and class "
            f"tokens (B, {len(source_modalities)}, z), got {tuple(latents.shape)} and {tuple(class_tokens.shape)}."
        )
    hints, tokens = [], []
    for index, modality in enumerate(source_modalities):
        patches = normalise_latents(latents[:, index], modality, mean, std)  # (B, z, h, w)
        pooled = normalise_latents(class_tokens[:, index, :, None, None], modality, mean, std)  # (B, z, 1, 1)
        hints.append(patches)
        tokens += [pooled.flatten(2), patches.flatten(2)]
    return torch.cat(hints, dim=1), torch.cat(tokens, dim=2).transpose(1, 2)


__all__ = [
    "PREDICTION_TYPES",
    "PRIOR_SIZES",
    "SCHEDULERS",
    "build_controlnet",
    "build_prior",
    "build_scheduler",
    "condition_on_sources",
    "denormalise_latents",
    "latent_shape",
    "normalise_latents",
    "null_context",
]
