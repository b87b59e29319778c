"""The four families of checkpoints that `model_cards/` describes, from their named sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models.configuration_solarchip import SolarChipConfig
from ..models.image_processing_solarchip import SolarChipImageProcessor
from ..models.modalities import MODALITY_NAMES
from ..models.modeling_solarchip import SolarChipForPreTraining
from ..models.modeling_solarchip_classification import SolarChipForImageClassification
from .card_facts import CardFacts, readable_size

_NO_WEIGHTS = "No weights of this family that were trained on the real archive are published with this package yet."


@dataclass(frozen=True)
class Family:
    """What the page of a family says beyond its facts.

    Attributes:
        title: Its heading.
        kind: As in `CardFacts`.
        repo_id: The name that its code uses.
        sizes: Named sizes, the first being the one that the page describes.
        modalities: Channels of that one.
        untrained: What stands under "Training".
    """

    title: str
    kind: str
    repo_id: str
    sizes: tuple[str, ...]
    modalities: Sequence[str]
    untrained: str


FAMILIES: dict[str, Family] = {
    "vit": Family(
        title="SolarCHIP ViT: features of SDO images by a vision transformer",
        kind="backbone",
        repo_id="solarchip/vit-base",
        sizes=("vit-base", "vit-tiny", "vit-small", "vit-large"),
        modalities=MODALITY_NAMES,
        untrained=f"{_NO_WEIGHTS} `examples/pretrain.py` trains one on your files; `make quickstart` trains `vit-tiny` "
        "on synthetic images. The card of a checkpoint says what it was trained on.",
    ),
    "cnn": Family(
        title="SolarCHIP CNN: latents of SDO images by a convolutional autoencoder",
        kind="backbone",
        repo_id="solarchip/cnn-base",
        sizes=("cnn-base",),
        modalities=MODALITY_NAMES,
        untrained=f"{_NO_WEIGHTS} `examples/pretrain.py --model_name cnn-base` trains one on your files.",
    ),
    "flare": Family(
        title="SolarCHIP flare forecast: probabilities from full-disk images",
        kind="flare",
        repo_id="solarchip/flare-vit-base",
        sizes=("vit-base", "vit-tiny", "vit-small"),
        modalities=("hmi",),
        untrained=f"{_NO_WEIGHTS} `examples/finetune_flare.py` tunes a backbone on your labels.",
    ),
    "controlnet": Family(
        title="SolarCHIP translation: one channel of the Sun from another",
        kind="translation",
        repo_id="solarchip/controlnet-hmi-aia171",
        sizes=("cnn-base",),
        modalities=("hmi", "aia171"),
        untrained=f"{_NO_WEIGHTS} `examples/train_prior.py` and `examples/train_controlnet.py` train the prior "
        "of a target and the ControlNet of a source.",
    ),
}


def _config(family: Family, size: str) -> SolarChipConfig:
    anchor = "hmi" if "hmi" in family.modalities else family.modalities[0]
    return SolarChipConfig.from_name(size, modalities=list(family.modalities), anchor_modality=anchor)


def _parameters(family: Family, config: SolarChipConfig) -> int:
    """Parameters of the whole model, counted without allocating it."""
    model_class = SolarChipForImageClassification if family.kind == "flare" else SolarChipForPreTraining
    with torch.device("meta"):
        model = model_class(config)
    return sum(parameter.numel() for parameter in model.parameters())


def family_facts(name: str) -> CardFacts:
    """The facts of a family: those of its first size, untrained.

    Args:
        name: One of `FAMILIES`.

    Returns:
        Facts without weights, training or results.

    Raises:
        ValueError: There is no such family.
    """
    if name not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {name!r}.")
    family = FAMILIES[name]
    config = _config(family, family.sizes[0])
    processor = SolarChipImageProcessor(modalities=config.modalities, size=config.image_size)
    facts = CardFacts(family.kind, family.repo_id, config=config.to_dict(), processor=processor.to_dict())
    facts.has_code = family.kind != "translation"
    if family.kind == "translation":
        facts.parameters = _translation_parameters(config)
        facts.pipeline = {
            "autoencoder": ["solarchip_hf", "SolarChipForPreTraining"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "controlnet": ["diffusers", "ControlNetModel"],
            "source_modalities": [family.modalities[0]],
            "target_modality": family.modalities[1],
        }
    else:
        facts.parameters[""] = _parameters(family, config)
    return facts


def _translation_parameters(config: SolarChipConfig) -> dict[str, int]:
    from ..translation import build_controlnet, build_prior, latent_shape

    shape = latent_shape(config)
    with torch.device("meta"):
        prior = build_prior(shape, size="published", token_width=config.hidden_size)
        control = build_controlnet(prior, shape[0])
        autoencoder = SolarChipForPreTraining(config)
    parts = {"autoencoder": autoencoder, "unet": prior, "controlnet": control}
    return {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}


def family_sizes(name: str) -> dict[str, Any] | None:
    """The table of a family's named sizes; None where there is one only.

    Args:
        name: One of `FAMILIES`.

    Returns:
        `text` and `rows` of cells.
    """
    family = FAMILIES[name]
    if len(family.sizes) < 2:
        return None
    rows = []
    for size in sorted(family.sizes, key=lambda entry: _config(family, entry).hidden_size):
        config = _config(family, size)
        one = _config(Family(**{**vars(family), "modalities": family.modalities[:1]}), size)
        count = _parameters(family, one)
        tokens = 1 + (config.image_size // config.patch_size) ** 2
        cells = [f"`{size}`", f"{config.image_size} px", str(tokens), f"{count / 1e6:.1f} M"]
        rows.append([*cells, readable_size(count * 4), readable_size(count * 16)])
    text = (
        "Named sizes, each counted for one tower; `weight_sharing` says how many towers there are "
        "(`benchmarks/memory.py` prints all eleven channels). Training state is AdamW in float32, 16 bytes a "
        "parameter, without activations."
    )
    return {"text": text, "rows": rows}


__all__ = ["FAMILIES", "Family", "family_facts", "family_sizes"]
