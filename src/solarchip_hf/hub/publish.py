"""Puts models, pipelines and prepared datasets on the Hub: with card, code and nothing that does not belong there.

    python examples/push_to_hub.py solarchip/vit-base --repo_id solarchip/vit-base --private

What goes up is chosen by name: weights (safetensors), configurations, the card, results and figures. Optimiser states,
`training_args.bin`, pickles, checkpoints and logs stay where they are.
"""

import fnmatch
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError
from tqdm.auto import tqdm

from ..data.shards import MANIFEST
from .card_check import check_card
from .card_facts import kind_of, read_facts
from .cards import CARD, MARK, is_generated, render_card, write_card
from .endpoint import HANDLER, endpoint_files
from .remote_code import code_files, json_bytes, with_auto_map

logger = logging.getLogger(__name__)

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_MODEL_FILES = (
    *_WEIGHTS,
    "config.json",
    "preprocessor_config.json",
    "card.json",
    CARD,
    "LICENSE",
    "metrics.json",
    "retrieval.md",
    "report.json",
    "report.md",
    "fidelity.json",
    "fidelity.md",
    "conversion.json",
    "figures/*.png",
    "examples/*",
    "ema/*.safetensors",
    "ema/config.json",
)
_PIPELINE_FILES = (
    *_MODEL_FILES,
    "model_index.json",
    "*/config.json",
    "*/preprocessor_config.json",
    "*/scheduler_config.json",
    "*/diffusion_pytorch_model*.safetensors",
    "*/model*.safetensors",
    "*/*.safetensors.index.json",
)
_DATASET_FILES = (
    MANIFEST,
    "statistics.json",
    "metadata.parquet",
    "failures.parquet",
    "preprocessor_config.json",
    "card.json",
    CARD,
    "LICENSE",
    "data/*.arrow",
)
_FILES = {"backbone": _MODEL_FILES, "flare": _MODEL_FILES, "translation": _PIPELINE_FILES, "dataset": _DATASET_FILES}
_PART = 50  # files that are asked about and sent at a time


@dataclass
class Publication:
    """What goes to the Hub, or went there.

    Attributes:
        repo_id: The repository.
        repo_type: `"model"` or `"dataset"`.
        files: Path in the repository to the file here (of `push_to_hub`: gone by then), or to its bytes.
        size: Bytes of all of them.
        skipped: Files of the folder that stay here.
        commit: Hash of the last commit; empty before.
        url: Of that commit; empty before.
    """

    repo_id: str
    repo_type: str
    files: dict[str, Path | bytes] = field(default_factory=dict)
    size: int = 0
    skipped: list[str] = field(default_factory=list)
    commit: str = ""
    url: str = ""


def collect(folder: str | Path, repo_id: str, *, code: bool = True, endpoint: bool = False) -> Publication:
    """Chooses what of a folder goes to the Hub; nothing is written, neither here nor there.

    Args:
        folder: A saved model, pipeline or prepared dataset.
        repo_id: Where it shall go, as `"solarchip/vit-base"`.
        code: Whether a model takes its code along, for `trust_remote_code=True`.
        endpoint: Whether `handler.py` and `requirements.txt` of Inference Endpoints go along.

    Returns:
        The choice. A folder without a card gets one.

    Raises:
        ValueError: The folder holds nothing to publish, its weights are missing, or its card would be refused.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    publication = Publication(repo_id, "dataset" if kind == "dataset" else "model")
    for path in _files_below(folder):
        name = path.relative_to(folder).as_posix()
        if any(_matches(name, pattern) for pattern in _FILES[kind]):
            publication.files[name] = path
        else:
            publication.skipped.append(name)
    weights = [name for name in publication.files if name.endswith(".safetensors")]
    if kind != "dataset" and not weights:
        raise ValueError(f"{folder}: expected weights as safetensors, got none. Save the model with save_pretrained.")
    facts = read_facts(folder, repo_id)
    if kind in ("backbone", "flare") and code:
        publication.files |= {path.name: path for path in code_files()}
        publication.files |= {name: json_bytes(content) for name, content in with_auto_map(folder).items()}
        publication.skipped = [name for name in publication.skipped if name not in publication.files]
        facts.has_code = True
    if endpoint and kind != "dataset":
        publication.files |= endpoint_files(folder)
        publication.skipped = [name for name in publication.skipped if name not in publication.files]
    written = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else MARK
    if is_generated(written):  # ours: written anew, with the repository's name and the code that goes along
        publication.files[CARD] = render_card(facts).encode()
    else:
        check_card(written)
    sizes = (len(file) if isinstance(file, bytes) else file.stat().st_size for file in publication.files.values())
    publication.size = sum(sizes)
    return publication


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str | None = None,
    code: bool = True,
    endpoint: bool = False,
    progress: bool = True,
) -> Publication:
    """Publishes the folder of a saved model, pipeline or prepared dataset.

    Contents go up first, in parts, and one commit at the end makes them visible; it also removes weights, shards and
    code of an earlier push that are no longer there. A reader sees the old state or the new one, and a push that was
    interrupted is continued by the same call.

    Args:
        folder: What to publish.
        repo_id: `"owner/name"`; made if it does not exist.
        private: Whether a new repository is private; None: the owner's default.
        revision: A branch; made if it does not exist.
        token: A token with the right to write; None: the one of `hf auth login` or HF_TOKEN.
        message: Of the commit.
        code: See `collect`.
        endpoint: See `collect`.
        progress: Whether to show a progress bar.

    Returns:
        What went up, with its commit.

    Raises:
        ValueError: See `collect`.
        huggingface_hub.errors.HfHubHTTPError: The Hub refuses: no right to write, no such owner, ...
    """
    publication = collect(folder, repo_id, code=code, endpoint=endpoint)
    api = HfApi(token=token, library_name="solarchip_hf")
    kind = publication.repo_type
    api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, repo_type=kind, exist_ok=True)
    message = message or f"Upload {publication.repo_type} with solarchip_hf"
    options: dict[str, Any] = {"repo_id": repo_id, "repo_type": kind, "revision": revision}
    additions = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in publication.files.items()
    ]
    with tqdm(total=len(additions), desc="push", unit="file", disable=not progress) as bar:
        for start in range(0, len(additions), _PART):
            part = additions[start : start + _PART]
            api.preupload_lfs_files(additions=part, **options)
            bar.update(len(part))
    operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions]
    operations += [CommitOperationDelete(path_in_repo=name) for name in _stale(api, publication, options)]
    info = api.create_commit(operations=operations, commit_message=message, **options)
    publication.commit, publication.url = info.oid, str(info.commit_url)
    logger.info("%s: %d files, %d bytes, commit %s", repo_id, len(publication.files), publication.size, info.oid)
    return publication


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    processor: Any = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str | None = None,
    max_shard_size: int | str = "5GB",
    endpoint: bool = False,
    card: dict[str, Any] | None = None,
) -> Publication:
    """Publishes a model (or a pipeline) from memory: weights, processor, card, and the code with its full `auto_map`.

    Whichever class is given, the repository serves `AutoModel`, `AutoModelForPreTraining`,
    `AutoModelForImageClassification` and `AutoImageProcessor` with `trust_remote_code=True`.

    Args:
        model: A SolarCHIP model, or a pipeline with `save_pretrained`.
        repo_id: `"owner/name"`.
        processor: The image processor that belongs to a model.
        private: See `push_folder`.
        revision: See `push_folder`.
        token: See `push_folder`.
        message: See `push_folder`.
        max_shard_size: Largest file of weights.
        endpoint: See `collect`.
        card: What the card shall say beyond configuration and weights: arguments of `write_card`.

    Returns:
        What went up, with its commit.

    Raises:
        ValueError: The processor's channels are not the model's, or `card` has an unknown name.
        huggingface_hub.errors.HfHubHTTPError: The Hub refuses.
    """
    if processor is not None and list(processor.modalities) != list(model.config.modalities):
        raise ValueError(
            f"processor.modalities: expected those of the model, {', '.join(model.config.modalities)}, got "
            f"{', '.join(processor.modalities)}. Make the processor with modalities=model.config.modalities."
        )
    with tempfile.TemporaryDirectory(prefix="solarchip-push-") as scratch:
        folder = Path(scratch) / repo_id.rpartition("/")[2]
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if processor is not None:
            processor.save_pretrained(folder)
        write_card(folder, repo_id=repo_id, **(card or {}))
        options = {"private": private, "revision": revision, "token": token, "message": message}
        return push_folder(folder, repo_id, endpoint=endpoint, progress=False, **options)


def _files_below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden:
            yield path


def _matches(name: str, pattern: str) -> bool:
    """Whether a path has a pattern's depth and fits it part by part: `*` does not cross a folder."""
    parts, wanted = PurePosixPath(name).parts, PurePosixPath(pattern).parts
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _stale(api: HfApi, publication: Publication, options: dict[str, Any]) -> list[str]:
    """Weights, shards and code of an earlier push that this one has not."""
    try:
        there = api.list_repo_files(**options)
    except EntryNotFoundError:  # an empty repository has no tree
        return []
    patterns = (*_WEIGHTS, *(f"*/{pattern}" for pattern in _WEIGHTS), "data/*.arrow")
    code = {HANDLER, *(path.name for path in code_files())}
    old = [name for name in there if name in code or any(_matches(name, pattern) for pattern in patterns)]
    return [name for name in old if name not in publication.files]


__all__ = ["Publication", "collect", "push_folder", "push_to_hub"]
