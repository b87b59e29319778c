"""What an Inference Endpoint needs beside the weights: `handler.py` and `requirements.txt`."""

import re
from importlib.metadata import requires
from pathlib import Path

from . import handler
from .card_facts import kind_of, read_json

HANDLER = "handler.py"
REQUIREMENTS = "requirements.txt"
_MODEL_NEEDS = ("torch", "transformers", "numpy", "astropy", "pillow")


def endpoint_files(folder: str | Path) -> dict[str, Path | bytes]:
    """The files of an Inference Endpoint for a saved model or pipeline.

    Args:
        folder: A backbone, a flare model or a translation pipeline.

    Returns:
        Name to file, or to its bytes. Versions are those that the package itself asks for.

    Raises:
        ValueError: The folder holds something else.
    """
    kind = kind_of(folder)
    if kind == "dataset":
        raise ValueError(f"{folder}: expected a model or a pipeline to serve, got a dataset.")
    if kind == "translation":
        needs = ["solarchip_hf[sunpy,cnn]"]
    else:
        tower = read_json(Path(folder) / "config.json").get("backbone_config") or {}
        names = {*_MODEL_NEEDS, *(["diffusers"] if tower.get("model_type") == "solarchip_cnn" else [])}
        wanted = (text.partition(";")[0].strip() for text in requires("solarchip_hf") or [])
        needs = sorted({text for text in wanted if re.split(r"[^\w-]", text, maxsplit=1)[0].lower() in names})
    return {HANDLER: Path(str(handler.__file__)), REQUIREMENTS: ("\n".join(needs) + "\n").encode()}


__all__ = ["HANDLER", "REQUIREMENTS", "endpoint_files"]
