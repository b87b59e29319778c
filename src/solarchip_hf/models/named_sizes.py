"""The named sizes of `SolarChipConfig.from_name`: fields that differ from the defaults."""

from typing import Any

_VIT_LAPTOP = {"decoder_num_hidden_layers": 2, "model_type": "solarchip_vit"}
NAMED_SIZES: dict[str, dict[str, Any]] = {
    "vit-tiny": {
        "backbone_config": {
            **_VIT_LAPTOP,
            "image_size": 128,
            "patch_size": 16,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        "projection_dim": 128,
    },
    "vit-small": {
        "backbone_config": {
            **_VIT_LAPTOP,
            "image_size": 512,
            "patch_size": 32,
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "decoder_num_hidden_layers": 4,
        },
        "projection_dim": 384,
    },
    "vit-base": {"backbone_config": {"model_type": "solarchip_vit"}, "projection_dim": 768},
    "vit-large": {
        "backbone_config": {
            "model_type": "solarchip_vit",
            "patch_size": 32,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "decoder_num_hidden_layers": 8,
        },
        "projection_dim": 1024,
    },
    "cnn-base": {
        "backbone_config": {"model_type": "solarchip_cnn", "norm_min_channels": 2},
        "projection_dim": 32,
        "cls_loss_weight": 0.01,
        "patch_loss_weight": 0.0001,
        "intra_loss_weight": 0.0001,
    },
}

__all__ = ["NAMED_SIZES"]
