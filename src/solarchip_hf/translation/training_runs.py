"""What the training examples share: opening latents, the folder of a prior, and sampled figures on the way."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from accelerate import PartialState

from ..data.observations import Observations, load_observations
from ..data.shards import write_json
from ..models.configuration_solarchip import SolarChipConfig
from ..models.image_processing_solarchip import SolarChipImageProcessor
from ..models.modalities import MODALITIES
from ..models.modeling_solarchip import SolarChipForPreTraining
from ..training.figures import colormap, draw_limb, new_figure, save_figure
from .components import build_scheduler, denormalise_latents, null_context
from .latents import LatentDataset, encode_dataset

logger = logging.getLogger(__name__)

PRIOR_FORMAT = 1
_PRIOR_FACTS = "prior.json"


@dataclass
class LatentsArguments:
    """What prior and ControlNet are trained on; both are given the same."""

    _argument_group_name = "latents: what prior and ControlNet are trained on, the same for both"

    autoencoder: str = field(
        default="solarchip/vit-base", metadata={"help": "Pretrained autoencoder: a folder, or a Hub name."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "A prepared dataset with the autoencoder's channels."})
    latents_dir: str = field(
        default="latents", metadata={"help": "Where the latents are kept, encoded once, on a disk of all processes."}
    )
    latents_dtype: str = field(default="float16", metadata={"help": "How they are stored: float16 or float32."})
    encode_batch_size: int = field(default=32, metadata={"help": "Observations encoded at a time."})
    note: str = field(default="", metadata={"help": "What the data are, for titles, as 'SyntheticSun'."})


@dataclass
class OpenedLatents:
    """An autoencoder, the dataset that it was given, and its latents.

    Attributes:
        autoencoder: Frozen, in evaluation mode.
        observations: The images, with the processor that scales them.
        latents: All rows of the dataset, encoded.
    """

    autoencoder: SolarChipForPreTraining
    observations: Observations
    latents: LatentDataset

    def ceiling(self) -> str:
        """A line a channel: what the autoencoder alone loses on held-out images, which no translation can beat."""
        return "\n".join(
            f"  {name}: correlation {row['correlation']:.3f}, RMSE {row['rmse']:.4g} {row['unit']}, MAE "
            f"{row['mae']:.4g} {row['unit']} ({row['images']} images)"
            for name, row in self.latents.reconstruction.items()
        )


def open_config(autoencoder: str | os.PathLike) -> SolarChipConfig:
    """The configuration of an autoencoder, which tells the latents' shape before anything is encoded.

    Args:
        autoencoder: As for `open_latents`.

    Raises:
        OSError: There is none.
    """
    if not Path(autoencoder).is_dir() and str(autoencoder).count("/") != 1:
        raise FileNotFoundError(
            f"autoencoder: expected a folder that examples/pretrain.py wrote, or a repository on the Hub as "
            f"'owner/name', got {str(autoencoder)!r}."
        )
    return SolarChipConfig.from_pretrained(autoencoder)


def _check_preparation(autoencoder: str | os.PathLike, observations: Observations) -> None:
    """Refuses a dataset that was prepared otherwise than what the autoencoder has learned from.

    Raises:
        ValueError: With what differs.
    """
    found = cached_file(
        autoencoder,
        IMAGE_PROCESSOR_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if found is None:
        logger.warning("%s has no image processor: that the dataset was prepared alike is not checked.", autoencoder)
        return
    learned, given = SolarChipImageProcessor.from_pretrained(autoencoder).statistics_key, observations.processor
    different = [
        f"{name} {value!r} instead of {learned.get(name)!r}"
        for name, value in given.statistics_key.items()
        if value != learned.get(name)
    ]
    if different:
        raise ValueError(
            f"data_dir: expected images prepared as those that the autoencoder {autoencoder} was trained on, got "
            f"{', '.join(different)}. Prepare the dataset alike, or give the autoencoder that was trained on it."
        )


def open_latents(
    autoencoder: str | os.PathLike,
    dataset: str | os.PathLike,
    latents_dir: str | os.PathLike,
    *,
    dtype: str = "float16",
    batch_size: int = 32,
    use_cpu: bool = False,
    progress: bool = True,
) -> OpenedLatents:
    """Loads an autoencoder and a prepared dataset, and encodes what is not encoded yet, each process its share.

    Args:
        autoencoder: Folder or Hub name of a pretrained `SolarChipForPreTraining`.
        dataset: Folder or Hub name of a prepared dataset with the autoencoder's channels.
        latents_dir: Folder of the latents.
        dtype: How they are stored.
        batch_size: Observations encoded at a time.
        use_cpu: Whether to stay on the CPU.
        progress: Whether to show a bar.

    Returns:
        All three.

    Raises:
        OSError: A folder does not exist.
        ValueError: The parts do not fit each other, or the latents are stale.
    """
    open_config(autoencoder)
    state = PartialState(cpu=use_cpu)
    model = SolarChipForPreTraining.from_pretrained(autoencoder).requires_grad_(False).eval().to(state.device)
    observations = load_observations(dataset, modalities=model.config.modalities)
    _check_preparation(autoencoder, observations)
    bar = progress and state.is_main_process
    latents = encode_dataset(model, observations, latents_dir, dtype=dtype, batch_size=batch_size, progress=bar)
    return OpenedLatents(model, observations, latents)


# The folder of a prior -----------------------------------------------------------------------------------------------


@dataclass
class Prior:
    """A trained prior and what it was trained on.

    Attributes:
        unet: The network, with averaged weights.
        scheduler: Its noise schedule for training, with the `prediction_type`.
        modalities: The targets that it knows, in the order of its labels.
        facts: The whole of `prior.json`.
    """

    unet: UNet2DConditionModel
    scheduler: SchedulerMixin
    modalities: list[str]
    facts: dict[str, Any]

    def label(self, target: str) -> int | None:
        """The label of a target; None where the prior has one only.

        Raises:
            ValueError: The prior does not know the target.
        """
        if target not in self.modalities:
            raise ValueError(
                f"target: expected one of {', '.join(self.modalities)}, which the prior knows, got {target}."
            )
        return self.modalities.index(target) if self.unet.config.num_class_embeds else None

    def check_latents(self, latents: LatentDataset) -> None:
        """Refuses latents of another autoencoder, or normalised otherwise.

        Raises:
            ValueError: With what differs.
        """
        key = latents.manifest["key"]
        same_weights = self.facts["autoencoder"] == key["autoencoder"]
        same_scale = all(
            self.facts[table].get(name) == getattr(latents, short).get(name)
            for name in self.modalities
            for table, short in (("latent_mean", "mean"), ("latent_std", "std"))
        )
        if not same_weights or not same_scale:
            what = "another autoencoder" if not same_weights else "other statistics (another dataset or split)"
            raise ValueError(
                f"prior: expected the latents that it was trained on, got latents of {what} in {latents.folder}. Give "
                "the same autoencoder, data_dir and latents_dir as to train_prior.py."
            )


def save_prior(
    folder: str | os.PathLike,
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    latents: LatentDataset,
    modalities: Sequence[str],
    **facts: Any,
) -> None:
    """Writes `unet/`, `scheduler/` and, last, `prior.json`.

    Args:
        folder: Where.
        unet: With the weights to keep.
        scheduler: The noise schedule.
        latents: What it was trained on.
        modalities: The targets, in the order of the labels.
        **facts: More to be noted, JSON-able.
    """
    folder = Path(folder)
    unet.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    known = {
        "format": PRIOR_FORMAT,
        "modalities": list(modalities),
        "autoencoder": latents.manifest["key"]["autoencoder"],
        "preparation": latents.preparation,
        "latent_mean": {name: latents.mean[name] for name in modalities},
        "latent_std": {name: latents.std[name] for name in modalities},
    }
    write_json(folder / _PRIOR_FACTS, {**known, **facts})


def load_prior(folder: str | os.PathLike) -> Prior:
    """Loads what `save_prior` wrote.

    Raises:
        FileNotFoundError: There is no prior.
        ValueError: It is of another format.
    """
    folder = Path(folder)
    if not (folder / _PRIOR_FACTS).is_file():
        raise FileNotFoundError(
            f"prior: expected a folder with {_PRIOR_FACTS} that examples/train_prior.py wrote, got {str(folder)!r}."
        )
    facts = json.loads((folder / _PRIOR_FACTS).read_text(encoding="utf-8"))
    if facts.get("format") != PRIOR_FORMAT:
        raise ValueError(
            f"{folder / _PRIOR_FACTS}: expected a prior of format {PRIOR_FORMAT}, got {facts.get('format')!r}. Load it "
            "with the solarchip_hf that wrote it or a later one, or train the prior anew with examples/train_prior.py."
        )
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    prediction = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    scheduler = build_scheduler("ddpm", prediction_type=prediction["prediction_type"])
    return Prior(unet, scheduler, facts["modalities"], facts)


# Samples on the way --------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_prior(
    unet: UNet2DConditionModel,
    shape: Sequence[int],
    *,
    prediction_type: str,
    class_label: int | None = None,
    num_inference_steps: int = 20,
    seed: int = 0,
) -> torch.Tensor:
    """Draws normalised latents from the prior alone, by UniPC.

    Args:
        unet: The prior.
        shape: (N, z, h, w).
        prediction_type: What it predicts.
        class_label: The target's label, of a prior of several.
        num_inference_steps: Evaluations of the network.
        seed: Of the noise.

    Returns:
        (N, z, h, w) float32.
    """
    scheduler = build_scheduler("unipc", prediction_type=prediction_type)
    scheduler.set_timesteps(num_inference_steps, device=unet.device)
    latents = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(unet.device)
    labels = None if class_label is None else torch.full((shape[0],), class_label, device=unet.device)
    for step in scheduler.timesteps:
        prediction = unet(latents, step, null_context(unet, shape[0]), class_labels=labels, return_dict=False)[0]
        latents = scheduler.step(prediction, step, latents, return_dict=False)[0]
    return latents


def decode_latents(opened: OpenedLatents, latents: torch.Tensor, modality: str) -> np.ndarray:
    """Normalised latents to images.

    Args:
        opened: The autoencoder and its dataset.
        latents: (N, z, h, w) normalised.
        modality: Their channel.

    Returns:
        (N, H, H) float32 in physical units.
    """
    raw = denormalise_latents(latents, modality, opened.latents.mean, opened.latents.std)
    ids = [opened.autoencoder.config.modalities.index(modality)] * len(raw)
    with torch.no_grad():
        images = opened.autoencoder.decode(raw.to(opened.autoencoder.device), ids)[:, 0]
    return opened.observations.processor.unscale(images, modality)


def image_grid_figure(rows: Sequence[tuple[str, str, np.ndarray]], path: str | os.PathLike, *, title: str = "") -> Path:
    """Rows of physical images in their channels' colour maps, north up, with the limb.

    Args:
        rows: For each a label, the channel, and (N, H, H) images in physical units. A row whose label starts with
            "spread" is drawn from zero on a neutral map.
        path: Where the PNG goes.
        title: Above the figure; say there what is synthetic.

    Returns:
        The path.
    """
    count = max(len(images) for _, _, images in rows)
    figure = new_figure(1.8 * count + 0.4, 1.9 * len(rows) + 0.4)
    grid = figure.subplots(len(rows), count, squeeze=False)
    for line, (label, modality, images) in zip(grid, rows, strict=True):
        low, high = _display_range(images, MODALITIES[modality].signed, spread=label.startswith("spread"))
        for axes, image in zip(line, images, strict=False):
            shown = np.arcsinh(image) if not MODALITIES[modality].signed and not label.startswith("spread") else image
            palette = "viridis" if label.startswith("spread") else colormap(modality)
            axes.imshow(shown, origin="lower", cmap=palette, vmin=low, vmax=high)
            draw_limb(axes, image.shape[-1])
        for axes in line:
            axes.set(xticks=[], yticks=[], facecolor="black")
        line[0].set_ylabel(f"{label}\n{MODALITIES[modality].label}", fontsize=8)
    figure.suptitle(title, fontsize=9)
    return save_figure(figure, path)


def _display_range(images: np.ndarray, signed: bool, *, spread: bool) -> tuple[float, float]:
    values = images[np.isfinite(images)]
    if not values.size:
        return 0.0, 1.0
    if signed and not spread:
        bound = max(float(np.quantile(np.abs(values), 0.995)), 1e-3)
        return -bound, bound
    if spread:
        return 0.0, max(float(np.quantile(values, 0.995)), 1e-6)
    low, high = np.arcsinh(np.quantile(values, [0.02, 0.998]))
    return float(low), float(max(high, low + 1e-3))


__all__ = [
    "LatentsArguments",
    "OpenedLatents",
    "Prior",
    "decode_latents",
    "image_grid_figure",
    "load_prior",
    "open_config",
    "open_latents",
    "sample_prior",
    "save_prior",
]
