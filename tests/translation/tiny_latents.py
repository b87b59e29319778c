"""A tiny dataset of the synthetic Sun with an untrained autoencoder, and latents in memory for the training loop."""

from pathlib import Path

import pandas as pd
import torch
from torch.utils.data import Dataset

from solarchip_hf import SolarChipConfig, SolarChipForPreTraining, SolarChipImageProcessor
from solarchip_hf.data import SyntheticSun, pair_observations, prepare_dataset, scan_archive
from solarchip_hf.translation.components import build_controlnet, build_prior, build_scheduler
from solarchip_hf.translation.diffusion_training import DiffusionArguments

MODALITIES = ["hmi", "aia171", "aia304"]
SHAPE = (8, 8, 8)


def draw_dataset(folder: Path) -> Path:
    """Ten training observations, 171 missing in one of them, and four held-out ones; 32 px. Returns its folder."""
    times = pd.date_range("2014-01-01", periods=10, freq="3D").append(pd.date_range("2014-03-10", periods=4, freq="1D"))
    SyntheticSun(seed=0, size=32).write_archive(folder / "archive", times, MODALITIES, progress=False)
    next((folder / "archive").rglob("AIA20140104_0000_0171.fits")).unlink()
    catalog = scan_archive(folder / "archive", index=folder / "catalog.parquet", workers=0, progress=False)
    pairs = pair_observations(catalog, "6min", anchor="hmi")
    processor = SolarChipImageProcessor(size=32, modalities=MODALITIES)
    options = {"train_end": "2014-02-01", "workers": 0, "progress": False}
    prepare_dataset(pairs, folder / "prepared", processor, modalities=MODALITIES, **options)
    return folder / "prepared"


def tiny_autoencoder(backbone: str = "vit", seed: int = 0) -> SolarChipForPreTraining:
    torch.manual_seed(seed)
    if backbone == "vit":
        fields = {"patch_size": 4, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
        fields |= {"model_type": "solarchip_vit", "num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    else:
        fields = {"model_type": "solarchip_cnn", "block_out_channels": [8, 8, 8], "layers_per_block": 1}
        fields |= {"latent_channels": 8, "norm_num_groups": 4, "double_z": backbone == "vae"}
    config = SolarChipConfig(
        backbone_config={"image_size": 32, **fields}, modalities=MODALITIES, projection_dim=8, weight_sharing="shared"
    )
    return SolarChipForPreTraining(config).eval()


class RandomLatents(Dataset):
    """Items as `PriorLatents` and `TranslationLatents` give them: the target follows from the hint."""

    def __init__(self, count: int = 24, labels: int = 2, seed: int = 0):
        random = torch.Generator().manual_seed(seed)
        self.hint = torch.randn(count, *SHAPE, generator=random)
        self.context = torch.randn(count, 1 + SHAPE[1] * SHAPE[2], SHAPE[0], generator=random)
        self.target = self.hint.flip(1) + 0.1 * torch.randn(count, *SHAPE, generator=random)
        self.label = torch.arange(count) % labels

    def __len__(self):
        return len(self.hint)

    def __getitem__(self, index):
        names = {"target": self.target, "hint": self.hint, "context": self.context, "class_label": self.label}
        return {name: values[index] for name, values in names.items()}


def tiny_prior(seed: int = 0, prior_modalities=("hmi", "aia171")):
    torch.manual_seed(seed)
    return build_prior(SHAPE, prior_modalities=prior_modalities, base_width=16, multipliers=(1, 2), num_heads=2)


def tiny_controlnet(prior, sources: int = 1):
    return build_controlnet(prior, sources * SHAPE[0])


def schedule(prediction_type: str = "epsilon"):
    return build_scheduler("ddpm", prediction_type=prediction_type)


def arguments(folder: Path, **overrides) -> DiffusionArguments:
    options = {
        "output_dir": str(folder),
        "max_steps": 6,
        "batch_size": 5,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "ema_decay": 0.9,
        "logging_steps": 2,
        "save_steps": 0,
        "seed": 3,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return DiffusionArguments(**{**options, **overrides})
