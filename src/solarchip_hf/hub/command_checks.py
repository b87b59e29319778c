"""What a command was given, refused in a sentence before anything is loaded: models by name, devices, arguments."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser

# A repository's name, which is a possible folder too; any other name is a folder or nothing.
_REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_TELLING = {"model_index.json": "pipeline", "prior.json": "prior", "manifest.json": "dataset"}  # file to kind
_FACTS = (*_TELLING, "config.json", "preprocessor_config.json")
_WANTED = {
    "model": "the folder of a SolarCHIP model, as examples/pretrain.py writes it",
    "autoencoder": "the folder of a pretrained autoencoder, as examples/pretrain.py writes it",
    "flare model": "the folder of a tuned flare model, as examples/finetune_flare.py writes it",
    "pipeline": "the folder of a saved pipeline, as examples/train_controlnet.py writes it",
}
_TAKEN = {
    "model": ("model", "flare model"),
    "autoencoder": ("model",),
    "flare model": ("flare model",),
    "pipeline": ("pipeline",),
}
_FOUND = {
    "model": "a pretrained model without a head that was tuned",
    "flare model": "a tuned flare model",
    "pipeline": "a translation pipeline",
    "prior": "the prior of a translation",
    "dataset": "a prepared dataset",
}
_ADVICE = {
    "model": "examples/extract_features.py takes it; examples/finetune_flare.py and train_prior.py build upon it.",
    "flare model": "examples/forecast.py takes it.",
    "pipeline": "examples/translate.py takes it.",
    "prior": "examples/train_controlnet.py takes it as --prior.",
    "dataset": "examples/pretrain.py and finetune_flare.py take it as --data_dir.",
}


def check_saved(name: str | os.PathLike, kind: str, *, argument: str = "model") -> None:
    """Refuses a name that stands for nothing, or for something else than what is wanted.

    Loaders ask the Hub for whatever is no folder, and ask again for a minute where there is no network. Here a name
    that can only be a folder is refused at once, and the Hub is asked a single time, for the small files that tell
    what a repository is.

    Args:
        name: A folder, or a repository on the Hub as `"owner/name"`.
        kind: `"model"` (a pretrained or a tuned one) or `"flare model"`, with an image processor; `"autoencoder"`, with
            or without; `"pipeline"`.
        argument: What it was given for, for the message.

    Raises:
        FileNotFoundError: There is no such folder, and no such repository that can be reached.
        ValueError: It is something else.
    """
    text = os.fspath(name)
    wanted = f"{argument}: expected {_WANTED[kind]}, or its name on the Hub, got {text!r}"
    if os.path.isfile(text):
        raise ValueError(f"{wanted}, which is a file. Name the folder that holds it, before the other inputs.")
    folder = Path(text) if os.path.isdir(text) else None
    if folder is None and not _REPOSITORY.fullmatch(text):
        raise FileNotFoundError(f"{wanted}: no such folder. A name on the Hub has the form OWNER/NAME.")
    folder = folder or _fetched_facts(text, wanted)
    found = _what(folder, "folder" if os.path.isdir(text) else "repository")
    if found not in _TAKEN[kind]:
        advice = _ADVICE.get(found, "Name what the training had as --output_dir.")
        raise ValueError(f"{wanted}, which is {_FOUND.get(found, found)}. {advice}")
    if kind.endswith("model") and not (folder / "preprocessor_config.json").is_file():
        raise ValueError(f"{wanted}, which lacks preprocessor_config.json. Save the image processor beside the model.")


def check_device(name: str) -> None:
    """Refuses a torch device that does not exist, or that this machine or this torch has not.

    Args:
        name: As `"cpu"`, `"cuda"` or `"cuda:1"`.

    Raises:
        ValueError: It cannot be used.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch built without CUDA asserts
        said = str(error).partition("\n")[0]
        raise ValueError(
            f"--device: expected one that torch has on this machine, as cpu or cuda, got {name!r} ({said})."
        ) from error


def parse_all(parser: HfArgumentParser, argv: Sequence[str], advice: str = "") -> tuple[Any, ...]:
    """Reads a command line into the parser's dataclasses, every word of it.

    Args:
        parser: Of the command.
        argv: Its words.
        advice: Where else a word that is no argument may belong.

    Raises:
        ValueError: A word is none of the arguments.
    """
    *parsed, rest = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
    if rest:
        raise ValueError(f"arguments: expected those that --help lists, got {' '.join(rest)}. {advice}".rstrip())
    return tuple(parsed)


def one_line(error: Exception) -> str:
    """An error in a line; of a configuration that refused a field, what the check said."""
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())


def _what(folder: Path, place: str) -> str:
    """The kind of what a folder holds, or words for what is wrong with it."""
    for file, kind in _TELLING.items():
        if (folder / file).is_file():
            return kind
    if not (folder / "config.json").is_file():
        return f"a {place} without config.json"
    try:
        config = dict(json.loads((folder / "config.json").read_bytes()))
    except (TypeError, ValueError):
        return f"a {place} whose config.json cannot be read"
    if config.get("model_type") != "solarchip":
        return f"a model of the type {config.get('model_type')!r}"
    tuned = any(name.endswith("ForImageClassification") for name in config.get("architectures") or [])
    return "flare model" if tuned else "model"


def _fetched_facts(name: str, wanted: str) -> Path:
    """The folder of the cache with a repository's small files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_FACTS)))
    except RepositoryNotFoundError as error:
        reason = "the Hub has no such repository, or it is private: then run `hf auth login`"
        raise FileNotFoundError(f"{wanted}: no such folder here, and {reason}.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        said = " ".join(str(error.__cause__ or error).split())
        reason = f"the Hub was not reachable ({said})"
        raise FileNotFoundError(f"{wanted}: no such folder here, and {reason}.") from error


__all__ = ["check_device", "check_saved", "one_line", "parse_all"]
