"""Configurations small enough that a test on one core takes a fraction of a second."""

import torch

from solarchip_hf import SolarChipConfig

VIT = {
    "model_type": "solarchip_vit",
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
}
CNN = {
    "model_type": "solarchip_cnn",
    "image_size": 32,
    "block_out_channels": [8, 8, 16],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 4,
}
BACKBONES = {"vit": VIT, "cnn": CNN, "vae": {**CNN, "double_z": True}}
MODALITIES = ["hmi", "aia171", "aia304"]


def tiny_config(backbone: str = "vit", backbone_fields: dict | None = None, **fields) -> SolarChipConfig:
    """A tiny configuration of a `"vit"`, a `"cnn"` or a `"vae"`, by default on HMI and two passbands."""
    values = {"modalities": MODALITIES, "projection_dim": 16, "classifier_hidden_size": 16, **fields}
    return SolarChipConfig(backbone_config={**BACKBONES[backbone], **(backbone_fields or {})}, **values)


def tiny_batch(
    observations: int = 4, modalities: int = 3, size: int = 32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled images (B, M, H, H), and marks (B, M) with one missing in two of the observations."""
    generator = torch.Generator().manual_seed(seed)
    pixel_values = torch.randn(observations, modalities, size, size, generator=generator)
    observed = torch.ones(observations, modalities, dtype=torch.bool)
    observed[1, -1] = observed[-1, 0] = False
    return pixel_values, observed
