"""A small synthetic dataset of magnetograms and 171 images, split in time, for the tests of translations."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from solarchip_hf import SolarChipConfig, SolarChipForPreTraining, SolarChipImageProcessor
from solarchip_hf.data import SyntheticSun, pair_observations, prepare_dataset, scan_archive
from solarchip_hf.evaluation.translation_cases import TranslationCases
from solarchip_hf.translation import (
    SolarChipControlNetPipeline,
    build_controlnet,
    build_prior,
    build_scheduler,
    latent_shape,
)

SIZE = 32
STATISTICS = {
    "photometry": "nominal",
    "degradation": None,
    "geometry": "rsun",
    "size": SIZE,
    "scaling": "log1p",
    "source": "a test",
    "modalities": {
        "hmi": {"mean": 0.0, "std": 1.3, "unit": "G"},
        "aia171": {"mean": 4.0, "std": 1.5, "unit": "DN"},
    },
}


def write_dataset(folder: Path, training: int = 16, held_out: int = 8) -> Path:
    """Prepared observations every second day: training ones, a gap of a rotation, held-out ones; one lacks its 171."""
    first = pd.date_range("2014-01-01", periods=training, freq="2D")
    last = pd.date_range(first[-1] + pd.Timedelta("30D"), periods=held_out, freq="2D")
    SyntheticSun(seed=0, size=64).write_archive(
        folder / "archive", first.append(last), ["hmi", "aia171"], progress=False
    )
    sorted((folder / "archive").rglob("AIA*_0171.fits"))[1].unlink()
    pairs = pair_observations(scan_archive(folder / "archive", workers=0))
    splits = ["train" if time <= first[-1].tz_localize("UTC") else "validation" for time in pairs["time_nominal"]]
    processor = SolarChipImageProcessor(modalities=["hmi", "aia171"], size=SIZE)
    prepare_dataset(pairs, folder / "prepared", processor, splits=splits, workers=0, progress=False)
    return folder / "prepared"


def tiny_autoencoder(seed: int = 0) -> SolarChipForPreTraining:
    torch.manual_seed(seed)
    config = SolarChipConfig.from_name(
        "vit-tiny",
        modalities=["hmi", "aia171"],
        image_size=SIZE,
        patch_size=4,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        decoder_num_hidden_layers=1,
        projection_dim=16,
    )
    return SolarChipForPreTraining(config).eval()


def tiny_pipeline(processor: SolarChipImageProcessor, source: str, target: str) -> SolarChipControlNetPipeline:
    """A pipeline of random weights, whose ControlNet is not without effect as an untrained one's."""
    model = tiny_autoencoder()
    prior = build_prior(latent_shape(model.config), base_width=32, multipliers=(1, 1), num_heads=2)
    controlnet = build_controlnet(prior, 32)
    torch.nn.init.normal_(controlnet.controlnet_mid_block.weight, std=0.2)
    statistics = [dict.fromkeys(("hmi", "aia171"), [value] * 32) for value in (0.0, 1.0)]
    processor = SolarChipImageProcessor.from_dict(processor.to_dict())
    return SolarChipControlNetPipeline(
        model, prior, controlnet, build_scheduler("unipc"), processor, [source], target, *statistics
    )


def made_up_cases(count: int = 12, target: str = "aia171", seed: int = 0) -> TranslationCases:
    """Cases of noise with blobs, a day apart, without any file."""
    rng = np.random.default_rng(seed)
    source = "aia171" if target == "hmi" else "hmi"
    processor = SolarChipImageProcessor(modalities=["hmi", "aia171"], size=SIZE, statistics=STATISTICS)
    field = rng.normal(0, 20, (count, SIZE, SIZE))
    for image in field:
        row, column = rng.integers(8, 20, 2)
        image[row : row + 2, column : column + 2], image[row : row + 2, column + 3 : column + 5] = 400, -400
    field[:, ~processor.support("hmi")] = np.nan
    corona = 100 + 2 * np.abs(np.nan_to_num(field)) + rng.normal(0, 5, field.shape)
    corona[:, ~processor.support("aia171")] = np.nan
    images = {"hmi": field.astype(np.float32), "aia171": corona.astype(np.float32)}
    scaled = {name: torch.from_numpy(processor.scale(values, name)) for name, values in images.items()}
    return TranslationCases(
        sources=scaled[source][:, None],
        target=scaled[target],
        truth=images[target],
        source_modalities=(source,),
        target_modality=target,
        times=pd.date_range("2014-03-01", periods=count, freq="1D", tz="UTC"),
        b0=np.full(count, -7.0),
        processor=processor,
    )
