"""Tiny models and a few synthetic files for the tests of cards, publishing and serving."""

from pathlib import Path

import torch

from solarchip_hf import (
    SolarChipConfig,
    SolarChipForImageClassification,
    SolarChipForPreTraining,
    SolarChipImageProcessor,
    SolarChipModel,
    SyntheticSun,
)

MODALITIES = ["hmi", "aia171"]
BACKBONE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
}


def tiny_model(model_class: type = SolarChipForPreTraining, **fields):
    """A model of 32 px images of HMI and AIA 171, with random weights."""
    torch.manual_seed(0)
    options = {"modalities": MODALITIES, "projection_dim": 16, "classifier_hidden_size": 16, **fields}
    return model_class(SolarChipConfig(backbone_config=BACKBONE, **options)).eval()


def tiny_processor() -> SolarChipImageProcessor:
    """Its image processor."""
    return SolarChipImageProcessor(modalities=MODALITIES, size=32)


def saved_model(folder: Path, model_class: type = SolarChipForPreTraining, **fields) -> Path:
    """A folder with a tiny model and its processor."""
    tiny_model(model_class, **fields).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def write_files(folder: Path, days: int = 1) -> list[Path]:
    """Synthetic FITS files of HMI and AIA 171, 64 px: one pair a day."""
    sun = SyntheticSun(seed=0, start="2014-02-01", days=max(days, 2), size=64)
    sun.write_archive(folder, sun.times("1D")[:days], MODALITIES, progress=False)
    return sorted(folder.rglob("*.fits"))


__all__ = [
    "MODALITIES",
    "SolarChipForImageClassification",
    "SolarChipForPreTraining",
    "SolarChipModel",
    "saved_model",
    "tiny_model",
    "tiny_processor",
    "write_files",
]
