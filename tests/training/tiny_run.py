"""A tiny model, a tiny world of blobs and quick training arguments, shared by the tests of this folder."""

import json
from pathlib import Path

import torch
from torch.utils.data import Dataset

from solarchip_hf.models.configuration_solarchip import SolarChipConfig
from solarchip_hf.models.modeling_solarchip import SolarChipForPreTraining
from solarchip_hf.training import SolarChipTrainingArguments

MODALITIES = ["hmi", "aia171", "aia304"]
STATISTICS = {"modalities": {name: {"mean": 0.2, "std": 1.1} for name in MODALITIES}}


class Blobs(Dataset):
    """Observations of bright blobs: every modality shows the same ones, each in its own way; some are missing."""

    def __init__(self, count: int, seed: int = 0, size: int = 32, missing: bool = True):
        random = torch.Generator().manual_seed(seed)
        axis = torch.linspace(-1.25, 1.25, size)
        inside = (axis[:, None] ** 2 + axis**2) < 1
        centres = torch.rand(count, 6, 2, generator=random) * 1.2 - 0.6
        distance = (axis[:, None] - centres[..., 0, None, None]) ** 2 + (axis - centres[..., 1, None, None]) ** 2
        blobs = torch.exp(-distance / 0.05)  # (count, 6, size, size)
        images = [blobs[:, :3].sum(1) - blobs[:, 3:].sum(1), blobs.sum(1), blobs.sum(1).sqrt()]
        self.pixel_values = torch.stack(images, dim=1) * inside
        self.observed = torch.ones(count, 3, dtype=torch.bool)
        if missing:
            self.observed[::5, 2] = False
            self.pixel_values[::5, 2] = torch.nan

    def __len__(self):
        return len(self.observed)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "observed": self.observed[index]}


def tiny_model(seed: int = 0, **overrides) -> SolarChipForPreTraining:
    torch.manual_seed(seed)
    fields = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "decoder_num_hidden_layers": 1,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 16,
        "modalities": MODALITIES,
        "projection_centering": "tokens",
        "cls_loss_weight": 1.0,
        "patch_loss_weight": 1.0,
        "intra_loss_weight": 0.1,
    }
    return SolarChipForPreTraining(SolarChipConfig.from_name("vit-tiny", **{**fields, **overrides}))


def arguments(folder: Path, **overrides) -> SolarChipTrainingArguments:
    options = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "logging_steps": 2,
        "learning_rate": 3e-3,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "seed": 3,
    }
    return SolarChipTrainingArguments(**{**options, **overrides})


class Processor:
    """Stands for the image processor: the Trainer reads its statistics and saves it beside the model."""

    statistics = STATISTICS

    def save_pretrained(self, folder):
        Path(folder, "preprocessor_config.json").write_text(json.dumps(self.statistics))
