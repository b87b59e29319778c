"""A pipeline small enough that a test on one core takes a fraction of a second, with random weights."""

from typing import Any

import numpy as np
import torch

from solarchip_hf import SolarChipConfig, SolarChipForPreTraining, SolarChipImageProcessor
from solarchip_hf.translation import (
    SolarChipControlNetPipeline,
    build_controlnet,
    build_prior,
    build_scheduler,
    latent_shape,
)

SIZE = 64
MODALITIES = ["hmi", "aia171", "aia304"]
BACKBONES: dict[str, dict[str, Any]] = {
    "vit": {
        "model_type": "solarchip_vit",
        "image_size": SIZE,
        "patch_size": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "decoder_num_hidden_layers": 1,
    },
    "cnn": {
        "model_type": "solarchip_cnn",
        "image_size": SIZE,
        "block_out_channels": [8, 8, 16, 16],
        "layers_per_block": 1,
        "latent_channels": 8,
        "norm_num_groups": 4,
    },
}


def tiny_autoencoder(backbone: str = "vit", seed: int = 0) -> SolarChipForPreTraining:
    """An autoencoder of 64 px images with random weights: 4 x 4 latents of 32 channels, or 8 x 8 of 8."""
    torch.manual_seed(seed)
    config = SolarChipConfig(backbone_config=BACKBONES[backbone], modalities=MODALITIES, projection_dim=16)
    return SolarChipForPreTraining(config).eval()


def tiny_pipeline(
    backbone: str = "vit",
    *,
    sources: tuple[str, ...] = ("hmi",),
    target: str = "aia171",
    prior_modalities: list[str] | None = None,
    scheduler: str = "unipc",
    trained: bool = True,
    **settings: Any,
) -> SolarChipControlNetPipeline:
    """A pipeline with random weights.

    Args:
        backbone: `"vit"` or `"cnn"`.
        sources: Channels of the sources.
        target: Channel of the target.
        prior_modalities: Of a modality-conditioned prior.
        scheduler: Name for `build_scheduler`.
        trained: Whether the zero convolutions are given random weights, so that the sources matter.
        **settings: Of the pipeline, to override.
    """
    autoencoder = tiny_autoencoder(backbone)
    shape = latent_shape(autoencoder.config)
    unet = build_prior(shape, base_width=32, multipliers=(1, 2), num_heads=2, prior_modalities=prior_modalities).eval()
    controlnet = build_controlnet(unet, shape[0] * len(sources)).eval()
    if trained:
        zeros = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
        for layer in [*zeros, controlnet.controlnet_cond_embedding.conv_out]:
            torch.nn.init.normal_(layer.weight, std=0.1)
    random = np.random.default_rng(1)
    values = {
        "latent_mean": {name: random.normal(0, 0.1, shape[0]).tolist() for name in MODALITIES},
        "latent_std": {name: random.uniform(0.5, 1.0, shape[0]).tolist() for name in MODALITIES},
        "source_modalities": list(sources),
        "target_modality": target,
        "prior_modalities": prior_modalities,
        **settings,
    }
    pipeline = SolarChipControlNetPipeline(
        autoencoder=autoencoder,
        unet=unet,
        controlnet=controlnet,
        scheduler=build_scheduler(scheduler),
        image_processor=SolarChipImageProcessor(modalities=MODALITIES, size=SIZE),
        **values,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_images(modality: str = "hmi", count: int = 2, seed: int = 0) -> np.ndarray:
    """(count, 64, 64) float32 images in physical units."""
    random = np.random.default_rng(seed)
    images = (
        random.normal(0, 100, (count, SIZE, SIZE)) if modality == "hmi" else random.gamma(2, 100, (count, SIZE, SIZE))
    )
    return images.astype(np.float32)
