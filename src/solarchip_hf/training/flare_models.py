"""Models to tune for flares: from a pretrained folder or from nothing, and their low-rank updates."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from ..models.configuration_solarchip import SolarChipConfig
from ..models.image_processing_solarchip import SolarChipImageProcessor
from ..models.modeling_solarchip_classification import SolarChipForImageClassification

logger = logging.getLogger(__name__)

_LORA_TARGETS = {
    "solarchip_vit": ["q_proj", "k_proj", "v_proj", "out_proj"],
    "solarchip_cnn": ["conv1", "conv2"],
}


def build_flare_model(
    name: str | Path,
    *,
    from_scratch: bool = False,
    modalities: Sequence[str] | None = None,
    seed: int = 0,
    **fields: Any,
) -> SolarChipForImageClassification:
    """A classifier of flares on a pretrained backbone, or the same network with weights drawn anew.

    Args:
        name: A saved folder or repository (`examples/pretrain.py` writes one); with `from_scratch` also a named size,
            as `"vit-tiny"`.
        from_scratch: Whether to draw all weights, the backbone's too: the control that a pretrained backbone must beat.
        modalities: Channels to use, in order; by default those of the saved model.
        seed: Of the weights that are drawn.
        **fields: Fields of `SolarChipConfig`: `classifier_head` (`"linear"` for a linear probe), `class_weights`,
            `focal_gamma`, `ordinal`, `classifier_dropout`, ...; with a named size also those of the backbone.

    Returns:
        The model, in evaluation mode, without a calibration.

    Raises:
        ValueError: A named size without `from_scratch`, an unknown name, or fields that do not fit.
        OSError: The folder or repository cannot be read.
    """
    fields = {key: value for key, value in fields.items() if value is not None} | {"calibration": None}
    set_seed(seed)
    text = str(name)
    saved = Path(text).is_dir() or "/" in text
    if not saved:
        if not from_scratch:
            raise ValueError(
                f"model_name: expected the folder of a pretrained model, got {text!r}. Pretrain one with "
                "examples/pretrain.py, or pass --from_scratch to draw the weights of this named size."
            )
        chosen = {} if modalities is None else {"modalities": list(modalities)}
        model = SolarChipForImageClassification(SolarChipConfig.from_name(text, **chosen, **fields))
        return model.eval()
    chosen = {} if modalities is None else {"modalities": list(modalities)}
    config = SolarChipConfig.from_pretrained(text, **chosen)
    for key, value in fields.items():
        if not hasattr(config, key):
            raise ValueError(f"{key}: expected a field of SolarChipConfig for a saved model, got an unknown one.")
        setattr(config, key, value)
    config = SolarChipConfig.from_dict(config.to_dict())  # checked as a whole
    if from_scratch:
        return SolarChipForImageClassification(config).eval()
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # that the head is new is known, and said below
    try:
        model, found = SolarChipForImageClassification.from_pretrained(text, config=config, output_loading_info=True)
    finally:
        transformers_logging.set_verbosity(before)
    missing = [key for key in found["missing_keys"] if not key.startswith("classifier.")]
    if missing:
        raise ValueError(
            f"model_name: expected the weights of every layer of the backbone in {text}, got none for {missing[:3]} "
            f"and {max(len(missing) - 3, 0)} more."
        )
    logger.info("%s: backbone loaded, %d tensors of the head drawn.", text, len(found["missing_keys"]))
    return model.eval()


def read_pretrained(name: str | Path) -> tuple[SolarChipConfig, SolarChipImageProcessor] | None:
    """The configuration and the image processor of a saved model.

    Args:
        name: A folder, a repository, or the name of a size.

    Returns:
        Both, or None for a bare name without a folder: a size, which has no weights.

    Raises:
        ValueError: The folder holds no model, or the repository cannot be reached.
    """
    text = str(name)
    if not Path(text).is_dir() and "/" not in text:
        return None
    try:
        return SolarChipConfig.from_pretrained(text), SolarChipImageProcessor.from_pretrained(text)
    except OSError as error:
        place = "a folder without config.json or preprocessor_config.json" if Path(text).is_dir() else "no such folder"
        raise ValueError(
            f"model_name: expected a folder that examples/pretrain.py wrote, or a repository that can be reached, got "
            f"{text!r}: {place} here, and the Hub says: {str(error).splitlines()[0]}"
        ) from error


def balanced_class_weights(classes: Any, num_classes: int = 4) -> list[float]:
    """Weights that give every class the same share of the loss: N / (classes present x count), 0 for an absent class.

    Args:
        classes: (N,) labels of the training part only; negative ones are unknown.
        num_classes: Number of classes.

    Returns:
        One weight a class; their mean over the samples is 1.

    Raises:
        ValueError: No known label.
    """
    classes = np.asarray(classes, dtype=np.int64)
    counts = np.bincount(classes[classes >= 0], minlength=num_classes)
    if not counts.sum():
        raise ValueError("class_weights: expected labels in the training part, got none.")
    present = counts > 0
    if not present.all():
        logger.warning("class_weights: no sample of class %s in training.", np.flatnonzero(~present).tolist())
    return [float(counts.sum() / (present.sum() * count)) if count else 0.0 for count in counts]


def parse_class_weights(words: Sequence[str] | None, classes: Any) -> list[float] | None:
    """Class weights as a command line has them: None, `["balanced"]`, or a number a class.

    Args:
        words: As above; `["none"]` is None too.
        classes: (N,) labels of the training part.

    Returns:
        The weights, or None for equal ones.

    Raises:
        ValueError: Neither.
    """
    if not words or list(words) == ["none"]:
        return None
    if list(words) == ["balanced"]:
        return balanced_class_weights(classes)
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ValueError(
            f"class_weights: expected 'balanced' or a number for every class, got {' '.join(words)!r}."
        ) from None


def add_lora(
    model: SolarChipForImageClassification, rank: int, alpha: float, dropout: float, targets: Sequence[str] | None
) -> Any:
    """Adds low-rank updates to layers of the backbone, in place, and freezes the rest of it (Hu et al. 2021).

    Args:
        model: The classifier; its head stays as it is and learns in full.
        rank: Rank of the updates.
        alpha: Their scale is `alpha / rank`.
        dropout: Dropout before them.
        targets: Names of layers; None: the attention's projections of a ViT, the convolutions of a CNN.

    Returns:
        peft's tuner; its `merge_and_unload()` adds the updates to the weights and removes their traces.

    Raises:
        ImportError: peft is not installed.
        ValueError: No layer bears such a name.
    """
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError as error:
        raise ImportError("tuning='lora': peft is needed: pip install 'solarchip_hf[lora]'") from error
    chosen = list(targets or _LORA_TARGETS[model.config.backbone_config.model_type])
    layers = [
        f"solarchip.{name}"
        for name, layer in model.solarchip.named_modules()
        if name.rpartition(".")[2] in chosen and isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    if not layers:
        kinds = sorted(
            {n.rpartition(".")[2] for n, m in model.solarchip.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
        )
        raise ValueError(f"lora_targets: expected some of {', '.join(kinds)}, got {', '.join(chosen)}.")
    settings = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=layers)
    tuner = LoraModel(model, settings, "default")
    model.classifier.requires_grad_(True)  # peft freezes all that it does not update
    return tuner


@torch.no_grad()
def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Number of parameters that learn, and of all."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, learns in counts if learns), sum(n for n, _ in counts)


__all__ = [
    "add_lora",
    "balanced_class_weights",
    "build_flare_model",
    "count_parameters",
    "parse_class_weights",
    "read_pretrained",
]
