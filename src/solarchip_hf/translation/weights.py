"""Where a pipeline's weights come from and which they are: the cache of the Hub, names, checksums."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_ALIGNMENT = 64  # bytes; of torch's own allocations on the CPU


def fetch_snapshot(name: str, **options: Any) -> str:
    """Brings a repository with a saved pipeline to the cache of the Hub.

    Args:
        name: `"owner/name"`.
        **options: `cache_dir`, `force_download`, `local_files_only`, `token`, `revision`; None counts as not given, and
            others are passed over.

    Returns:
        The folder of the snapshot.

    Raises:
        FileNotFoundError: The name is no repository's, or the repository cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    known = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    try:
        return snapshot_download(
            name,
            allow_patterns=["*.json", "*.safetensors", "*.md"],
            **{key: options[key] for key in known if options.get(key) is not None},
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        said = " ".join(str(error).split())
        raise FileNotFoundError(
            "pretrained_model_name_or_path: expected the folder of a saved pipeline, or a repository that can be "
            f"reached, got {name!r}: no such folder here, and the Hub says: {said}"
        ) from error


def name_and_revision(folder: Path | None) -> tuple[str, str]:
    """What weights are called.

    Args:
        folder: Where they were loaded from; None where they were not.

    Returns:
        Repository and commit of a snapshot in the Hub's cache; else the last two parts of the folder and `"local"`.
    """
    if folder is None:
        return "unsaved", "local"
    if folder.parent.name == "snapshots":  # huggingface_hub's cache: models--owner--name/snapshots/commit
        return folder.parents[1].name.removeprefix("models--").replace("--", "/"), folder.name
    return "/".join(folder.resolve().parts[-2:]), "local"


def weights_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Checksum of weights and buffers, as a `state_dict` gives them.

    Args:
        tensors: By name, in memory.

    Returns:
        Hexadecimal SHA-256 over names, types, shapes and values, in the order of the names.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.no_grad()
def align_weights(module: torch.nn.Module) -> None:
    """Moves weights on the CPU to aligned memory, in place, where they lie as a safetensors file happened to put them.

    A matrix product may take another kernel on unaligned memory and round otherwise: without this, a pipeline that was
    trained here and the same one loaded from its files differ in their last bits.

    Args:
        module: Any; weights on other devices stay where they are.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


class WeightsDigest:
    """A checksum over the weights of several modules, computed anew only after they have changed."""

    def __init__(self) -> None:
        self._state: Any = None
        self._digest = ""

    def __call__(self, modules: Mapping[str, torch.nn.Module]) -> str:
        """The checksum.

        Args:
            modules: By name; a module wrapped by `torch.compile` counts as itself.

        Returns:
            `weights_hash` of them all as they are in memory, names led by their module's.

        Raises:
            ValueError: Weights were moved out of reach by sequential offloading.
        """
        tensors: dict[str, torch.Tensor] = {}
        for part, module in modules.items():
            state = getattr(module, "_orig_mod", module).state_dict()
            tensors |= {f"{part}.{name}": tensor for name, tensor in state.items()}
        if any(tensor.is_meta for tensor in tensors.values()):
            raise ValueError(
                "weights: expected them in memory to name them in a Map, got sequentially offloaded ones; take "
                "enable_model_cpu_offload, or output_type='np'."
            )
        state = tuple((tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in tensors.values())
        if self._state != state:
            self._state, self._digest = state, weights_hash(tensors)
        return self._digest


__all__ = ["WeightsDigest", "fetch_snapshot", "name_and_revision", "weights_hash"]
