"""Export of a model together with its code, for machines on which this package is not installed."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from solarchip_hf import models

logger = logging.getLogger(__name__)

# Auto class -> module and class, for the two files that transformers reads such a map from. Saving one class would
# write its own entry alone, and the folder could then be loaded for that single purpose.
CONFIG_AUTO_MAP = {
    "AutoConfig": "configuration_solarchip.SolarChipConfig",
    "AutoModel": "modeling_solarchip.SolarChipModel",
    "AutoModelForPreTraining": "modeling_solarchip.SolarChipForPreTraining",
    "AutoModelForImageClassification": "modeling_solarchip_classification.SolarChipForImageClassification",
    "AutoImageProcessor": "image_processing_solarchip.SolarChipImageProcessor",
}
PROCESSOR_AUTO_MAP = {"AutoImageProcessor": CONFIG_AUTO_MAP["AutoImageProcessor"]}

_SOURCE = Path(models.__file__).parent


def code_files() -> list[Path]:
    """The modules that a checkpoint needs: those of the Auto classes and all siblings that they import."""
    entries = {_SOURCE / f"{target.split('.')[0]}.py" for target in CONFIG_AUTO_MAP.values()}
    needed = {Path(path) for entry in entries for path in get_relative_import_files(entry)}
    return sorted(entries | needed)


def with_auto_map(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The configurations of a saved model as they are beside its code: with the full `auto_map`.

    Args:
        folder: Has a `config.json`, and perhaps a `preprocessor_config.json`.

    Returns:
        File name to content; the files stay as they are.

    Raises:
        FileNotFoundError: There is no `config.json`.
        ValueError: `config.json` is not of a SolarCHIP model.
    """
    folder = Path(folder)
    config_path, processor_path = folder / "config.json", folder / "preprocessor_config.json"
    if not config_path.is_file():
        raise FileNotFoundError(f"{config_path}: expected the configuration of a saved model. Save the model first.")
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if config.get("model_type") != "solarchip":
        raise ValueError(f"{config_path}: model_type: expected 'solarchip', got {config.get('model_type')!r}.")
    contents = {config_path.name: {**config, "auto_map": CONFIG_AUTO_MAP}}
    if processor_path.is_file():
        processor = json.loads(processor_path.read_text(encoding="utf-8"))
        contents[processor_path.name] = {**processor, "auto_map": PROCESSOR_AUTO_MAP}
    return contents


def add_code(folder: str | Path) -> list[Path]:
    """Puts the code and the full `auto_map` into a folder that holds a saved model.

    Args:
        folder: Has a `config.json`; a `preprocessor_config.json` gets its map too.

    Returns:
        The Python files written.

    Raises:
        FileNotFoundError: There is no `config.json`.
        ValueError: `config.json` is not of a SolarCHIP model.
    """
    folder = Path(folder)
    for name, content in with_auto_map(folder).items():
        (folder / name).write_bytes(json_bytes(content))
    written = [Path(shutil.copyfile(source, folder / source.name)) for source in code_files()]
    logger.info("%s: wrote %d modules beside the weights", folder, len(written))
    return written


def save_with_code(model: Any, folder: str | Path, *, processor: Any = None, **save_options: Any) -> list[Path]:
    """Saves a model so that it loads without this package, by `trust_remote_code=True`.

    The folder holds the weights (safetensors), `config.json`, `preprocessor_config.json` if a processor is given, and
    the modules of `solarchip_hf.models`. Whichever class was saved, the folder serves all Auto classes.

    Args:
        model: A `SolarChipModel`, `SolarChipForPreTraining` or `SolarChipForImageClassification`.
        folder: Where to save; made if it does not exist.
        processor: The `SolarChipImageProcessor` that goes with the model.
        **save_options: As for `save_pretrained` of transformers, as `max_shard_size`.

    Returns:
        The Python files written.

    Raises:
        ValueError: The processor's modalities are not the model's.
    """
    if processor is not None and list(processor.modalities) != list(model.config.modalities):
        raise ValueError(
            f"processor.modalities: expected those of the model, {', '.join(model.config.modalities)}, got "
            f"{', '.join(processor.modalities)}. Make the processor with modalities=model.config.modalities."
        )
    model.save_pretrained(folder, **save_options)
    if processor is not None:
        processor.save_pretrained(folder)
    return add_code(folder)


def json_bytes(content: dict[str, Any]) -> bytes:
    """A configuration as transformers writes it: indented, sorted, UTF-8."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


__all__ = ["add_code", "code_files", "json_bytes", "save_with_code", "with_auto_map"]
