"""Opens checkpoints of the research code safely, tensors only and mapped from the file, and sorts them by branches."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .conversion_layout import FLARE_ENCODER, FLARE_HEAD, FOREIGN, ConversionError

_RESAVE = (
    "In the environment that wrote it, save the weights by themselves: "
    "torch.save({'state_dict': model.state_dict()}, new_path)."
)


def read_state_dict(path: str | Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Maps the tensors of a Lightning checkpoint, whose bytes are read only as they are used.

    Args:
        path: A file that `torch.save` wrote, with the weights under `"state_dict"`.

    Returns:
        The tensors by key, in the file's order, and the names of the file's other entries.

    Raises:
        FileNotFoundError: There is no such file.
        ConversionError: It is truncated, of another format, without weights, or would have to run code of its own.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint file, got none there.")
    _check_container(path)
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch has many ways to say that a file is bad; all stop here, with their reason
        raise ConversionError(f"{path}: {_reason(path, error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        got = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
        raise ConversionError(
            f"{path}: expected a Lightning checkpoint with 'state_dict', got {got or 'an empty one'}."
        )
    state = content["state_dict"]
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ConversionError(
                f"{path}: state_dict: expected tensors by name, got {type(value).__name__} at {key!r}."
            )
    return dict(state), [str(name) for name in content if name != "state_dict"]


def _check_container(path: Path) -> None:
    if zipfile.is_zipfile(path):
        return
    with path.open("rb") as stream:
        start = stream.read(4)
    if start == b"PK\x03\x04":
        reason = "expected a whole zip archive, got one without its end: the file is truncated. Copy it again"
    elif start[:1] == b"\x80":
        reason = (
            "expected the zip format of torch.save (torch 1.6 or later), got a bare pickle, which is not opened: to "
            f"read one can mean to run code that it holds. {_RESAVE.rstrip('.')}"
        )
    else:
        reason = (
            f"expected a file of torch.save, got one that starts with {start!r}. Look whether it is a download error"
        )
    raise ConversionError(f"{path}: {reason}.")


def _reason(path: Path, error: Exception) -> str:
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception as cause:  # the list is a courtesy; the file is refused with or without it
        return f"expected a whole checkpoint, got one that cannot be read ({error}; {cause}). Copy it again."
    if foreign:
        return (
            f"expected tensors and plain values only, got a file that needs {', '.join(sorted(foreign))} to be "
            f"imported and run (torch.load refuses it with weights_only=True). {_RESAVE}"
        )
    return f"expected a whole checkpoint, got one that cannot be read: {error}"


def _refuse_foreign(keys: Sequence[str]) -> None:
    for prefix, name, reason in FOREIGN:
        first = next((key for key in keys if key.startswith(prefix)), None)
        if first is not None:
            raise ConversionError(f"expected a pretraining checkpoint, got {name}, as {first!r} shows. {reason}")


def flare_encoder(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The encoder of a flare classifier by the keys of a branch `hmi`, and the keys of its head with their reason."""
    encoder, ignored = {}, {}
    for key, tensor in state.items():
        theirs, ours = next((pair for pair in FLARE_ENCODER if key.startswith(pair[0])), (None, None))
        if theirs is not None:
            encoder[f"model_dict.hmi.{ours}{key.removeprefix(theirs)}"] = tensor
        elif key.startswith(FLARE_HEAD):
            ignored[key] = "head of the flare classifier, which SolarChipForImageClassification has no place for"
        else:
            encoder[key] = tensor  # nobody knows it: an error further on
    if not ignored or len(encoder) == 0 or any(key.startswith("model_dict.") for key in state):
        raise ConversionError(
            f"encoder_only: expected a flare classifier of the research code (hmi_encoder, classifier, ...), got keys "
            f"such as {', '.join(list(state)[:3])}. Leave the option out for a pretraining checkpoint."
        )
    return encoder, ignored


def in_flare_words(key: str) -> str:
    """A key of the branch `hmi` as a flare classifier has it, also within a text."""
    for theirs, ours in FLARE_ENCODER:
        key = key.replace(f"model_dict.hmi.{ours}", theirs)
    return key


def split_branches(state: dict[str, torch.Tensor]) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """Tensors by branch and key within it, and the keys outside all branches."""
    branches: dict[str, dict[str, torch.Tensor]] = {}
    outside = []
    for key, tensor in state.items():
        head, _, rest = key.partition(".")
        branch, _, name = rest.partition(".")
        if head == "model_dict" and name:
            branches.setdefault(branch, {})[name] = tensor
        else:
            outside.append(key)
    if not branches:
        _refuse_foreign(outside)
        raise ConversionError(
            f"expected keys model_dict.<modality>..., got {', '.join(outside[:3]) or 'no key at all'}: this is no "
            "checkpoint of SolarCHIP's pretraining.",
            unexpected=outside,
        )
    return branches, outside


__all__ = ["flare_encoder", "in_flare_words", "read_state_dict", "split_branches"]
