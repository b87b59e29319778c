"""What a run may go on from: a saved model, a checkpoint, an output folder that is free."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from ..models.configuration_solarchip import SolarChipConfig
from ..models.image_processing_solarchip import SolarChipImageProcessor
from ..models.modalities import resolve_modality
from .checkpoints import last_complete_checkpoint


def saved_config(folder: str | Path, wishes: Mapping[str, Any]) -> SolarChipConfig:
    """The configuration of a saved model; fields that it has otherwise are refused, not passed over.

    Args:
        folder: Of the saved model.
        wishes: Fields of a `SolarChipConfig` or of its backbone by name, channels by any of their names.

    Returns:
        What was saved.

    Raises:
        ValueError: There is no model, or a wish differs; the sentence names every one.
    """
    if not (Path(folder) / CONFIG_NAME).exists():  # transformers would give a configuration of defaults
        raise ValueError(f"model_name: expected a name, or the folder of a saved model, got {folder} without a model.")
    config, missing, different = SolarChipConfig.from_pretrained(folder), object(), []
    for name, wish in wishes.items():
        if name == "anchor_modality":
            wish = resolve_modality(wish)
        elif name == "modalities":
            wish = [resolve_modality(modality) for modality in wish]
        held = getattr(config, name, getattr(config.backbone_config, name, missing))
        if held != wish:
            different.append(f"{name}={wish!r} (saved: {'none such' if held is missing else repr(held)})")
    if different:
        raise ValueError(
            f"model_name: expected arguments that agree with the model saved in {folder}, got {', '.join(different)}. "
            "Leave them out, or name a size to start anew."
        )
    return config


def saved_processor(
    folder: str | Path, wishes: Mapping[str, Any], usual: Mapping[str, Any]
) -> SolarChipImageProcessor | None:
    """The image processor beside a saved model, whose geometry and photometry its weights know.

    Args:
        folder: Of the saved model.
        wishes: `geometry` and `photometry` that are asked for.
        usual: Their defaults, which ask for nothing.

    Returns:
        The processor, or None where there is no model or none beside it.

    Raises:
        ValueError: Another geometry or photometry is asked for.
    """
    if not (Path(folder) / IMAGE_PROCESSOR_NAME).exists():
        return None
    processor = SolarChipImageProcessor.from_pretrained(folder)
    for name in ("geometry", "photometry"):
        saved = getattr(processor, name)
        if wishes[name] not in (usual[name], saved):
            raise ValueError(f"{name}: expected {saved!r}, that of {folder}, got {wishes[name]!r}. Leave it out.")
    return processor


def check_checkpoint(folder: str | Path, model: torch.nn.Module) -> None:
    """Refuses a checkpoint of another model, before a step is taken.

    Args:
        folder: A checkpoint with safetensors files.
        model: The model that is to go on.

    Raises:
        ValueError: Its channels, or the names or shapes of its weights, are others.
    """
    saved = SolarChipConfig.from_pretrained(folder)
    if saved.modalities != model.config.modalities:
        reason = f"one of {', '.join(saved.modalities)}"
    else:
        theirs: dict[str, tuple[int, ...]] = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                theirs |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if theirs == ours:
            return
        name = min(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        reason = f"other weights: {name} is {theirs.get(name, 'absent')} there and {ours.get(name, 'absent')} here"
    raise ValueError(
        f"resume_from_checkpoint: expected a checkpoint of this model ({', '.join(model.config.modalities)}), got "
        f"{folder}: {reason}. Resume with the arguments of that run, or start in another output_dir."
    )


def check_output_dir(output_dir: str | Path) -> None:
    """Refuses to begin anew among the checkpoints of an earlier run, which a later resume would take for its own.

    Args:
        output_dir: Of a run that starts at step 0.

    Raises:
        ValueError: There is a complete checkpoint.
    """
    found = last_complete_checkpoint(output_dir)
    if found is not None:
        raise ValueError(
            f"output_dir: expected a folder without checkpoints of an earlier run, got {found}. "
            "Pass --resume_from_checkpoint last to go on from it, or another output_dir, or remove the old ones."
        )


__all__ = ["check_checkpoint", "check_output_dir", "saved_config", "saved_processor"]
