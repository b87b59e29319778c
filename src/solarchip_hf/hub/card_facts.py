"""What is known about a saved model, pipeline or dataset: read from its own files, nothing made up."""

import dataclasses
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.shards import MANIFEST as DATASET_MANIFEST
from .card_results import CardResult, flare_results, pretraining_results, translation_results

FACTS = "card.json"  # what a card says beyond the other files, so that it can be written again
# What a run leaves beside its weights, and how a card reads it.
_REPORTS = {"metrics.json": pretraining_results, "report.json": flare_results, "fidelity.json": translation_results}
TRAINING_ARGUMENTS = "training_args.json"

# What is told of the training arguments; paths, trackers and the like are nobody's business.
_ARGUMENTS = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "backbone_learning_rate",
    "tuning",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
    "augmentation",
    "polarity_reversal",
    "roll_degrees",
    "gradient_cache_chunk",
    "ema_decay",
)


@dataclass
class CardFacts:
    """What a card is made of; what is not known is None or empty.

    Attributes:
        kind: `"backbone"`, `"flare"`, `"translation"` or `"dataset"`.
        repo_id: Name on the Hub, or the folder as a user would write it.
        config: The model's `config.json`; of a pipeline, that of its autoencoder.
        processor: The image processor's `preprocessor_config.json`.
        pipeline: The `model_index.json` of a pipeline.
        manifest: The `manifest.json` of a dataset.
        parameters: Number of parameters by component; one entry, `""`, for a model.
        weight_bytes: Bytes of the weights' files.
        has_code: Whether the folder carries its code.
        data: What the training data are, in words.
        synthetic: Whether they are synthetic; None: not known.
        training: Figures of the training: arguments, observations and periods a split, hardware.
        results: The figures.
        datasets: Repositories of the training data on the Hub.
        base_model: Repository of the model that this one was tuned from.
        license: Identifier of the weights' licence, as the Hub writes it.
        memory: Measured memory, see `measure_memory`.
        examples: Widget examples: mappings with `src` and `example_title`, and perhaps `output`.
    """

    kind: str
    repo_id: str
    config: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    pipeline: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    weight_bytes: int = 0
    has_code: bool = False
    data: str = ""
    synthetic: bool | None = None
    training: dict[str, Any] = field(default_factory=dict)
    results: list[CardResult] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    base_model: str | None = None
    license: str | None = "apache-2.0"
    memory: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)


# What `write_card` may be told, and what `card.json` keeps.
TOLD = ("data", "synthetic", "training", "results", "datasets", "base_model", "license", "memory", "examples")


def readable_size(count: float) -> str:
    """Bytes for readers: MiB, from 1024 of them on GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a mapping; empty where there is no such file.

    Raises:
        ValueError: The file is no JSON, or holds no mapping.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected names with values, got {type(content).__name__}.")
    return content


def kind_of(folder: str | Path) -> str:
    """What a folder holds.

    Args:
        folder: A folder that `save_pretrained`, a Trainer or `prepare_dataset` wrote.

    Returns:
        `"backbone"`, `"flare"`, `"translation"` or `"dataset"`.

    Raises:
        ValueError: None of these.
    """
    folder = Path(folder)
    if (folder / DATASET_MANIFEST).is_file() and (folder / "metadata.parquet").is_file():
        return "dataset"
    if read_json(folder / "model_index.json"):
        return "translation"
    config = read_json(folder / "config.json")
    if config.get("model_type") == "solarchip":
        names = config.get("architectures") or []
        return "flare" if any(name.endswith("ForImageClassification") for name in names) else "backbone"
    got = f"model_type {config['model_type']!r}" if config.get("model_type") else "none of their files"
    raise ValueError(
        f"{folder}: expected a saved SolarCHIP model (config.json), a pipeline (model_index.json) or a prepared "
        f"dataset (manifest.json), got {got}."
    )


def weights_in(folder: Path) -> tuple[int, int]:
    """Parameters and bytes of the safetensors files right in a folder, read from their headers.

    Raises:
        ValueError: A file is no safetensors file.
    """
    parameters = size = 0
    for path in sorted(folder.glob("*.safetensors")):
        size += path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            text = stream.read(length) if 0 < length <= path.stat().st_size else b""
        try:
            header = json.loads(text)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: expected a safetensors file, got one without its header.") from error
        parameters += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return parameters, size


def read_facts(folder: str | Path, repo_id: str | None = None) -> CardFacts:
    """Gathers what a folder's own files say.

    Args:
        folder: A saved model, pipeline or prepared dataset.
        repo_id: Its name on the Hub; default: its last two path components, as `solarchip/vit-base`.

    Returns:
        The facts.

    Raises:
        ValueError: The folder is none of these, or one of its files cannot be read.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    facts = CardFacts(kind, repo_id or "/".join(folder.resolve().parts[-2:]))
    if kind == "dataset":
        facts.manifest = read_json(folder / DATASET_MANIFEST)
        facts.processor = read_json(folder / "preprocessor_config.json")
        facts.license = None  # whose the images are, this folder does not say
    elif kind == "translation":
        facts.pipeline = read_json(folder / "model_index.json")
        facts.config = read_json(folder / "autoencoder" / "config.json")
        facts.processor = read_json(folder / "image_processor" / "preprocessor_config.json")
        for part in sorted(path for path in folder.iterdir() if path.is_dir()):
            parameters, size = weights_in(part)
            if parameters:
                facts.parameters[part.name] = parameters
                facts.weight_bytes += size
    else:
        facts.config = read_json(folder / "config.json")
        facts.processor = read_json(folder / "preprocessor_config.json")
        facts.parameters[""], facts.weight_bytes = weights_in(folder)
        facts.has_code = bool(facts.config.get("auto_map"))
    arguments = read_json(folder / TRAINING_ARGUMENTS)
    if arguments:
        facts.training["arguments"] = told_arguments(arguments)
    reports = {name: read_json(folder / name) for name in _REPORTS}
    for report in reports.values():
        facts.data = facts.data or str(report.get("data") or "")
        if report.get("synthetic") or "synthetic" in str(report.get("data")).lower():
            facts.synthetic = True
    samples = reports["report.json"].get("samples") or {}
    splits = {name: _period(part) for name, part in samples.items() if part.get("count")}
    if splits:
        facts.training["splits"] = splits
    told = read_json(folder / FACTS)
    for name in TOLD:
        if told.get(name) not in (None, "", [], {}):
            setattr(facts, name, told[name])
    facts.results = [CardResult(**row) for row in told.get("results", [])]
    for name, read in _REPORTS.items():
        facts.results += read(reports[name], data=facts.data, synthetic=facts.synthetic)
    return facts


def _period(part: Mapping[str, Any]) -> dict[str, Any]:
    days = {name: str(part[name])[:10] for name in ("first", "last") if part.get(name)}
    return {"observations": part["count"], **days}


def save_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes `card.json`, whole or not at all."""
    content = {name: facts[name] for name in TOLD if facts.get(name) not in (None, "", [], {})}
    if "results" in content:
        rows = [asdict(row) if isinstance(row, CardResult) else dict(row) for row in content["results"]]
        content["results"] = [row for row in rows if math.isfinite(row["value"])]  # JSON knows no other numbers
    scratch = folder / f".{FACTS}.new"
    scratch.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    scratch.replace(folder / FACTS)


def told_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The training arguments that a card tells, without those that say nothing."""
    chosen = {name: arguments[name] for name in _ARGUMENTS if arguments.get(name) not in (None, False, "")}
    chosen.pop("num_train_epochs" if (chosen.get("max_steps") or -1) > 0 else "max_steps", None)
    if chosen.get("augmentation") != "solar":
        chosen.pop("roll_degrees", None)
        chosen.pop("polarity_reversal", None)
    return chosen


def training_facts(trainer: Any) -> dict[str, Any]:
    """What a Trainer knows at its end.

    Args:
        trainer: A transformers Trainer; datasets with `metadata` (`load_observations`) tell their periods too.

    Returns:
        `arguments`, `splits` (observations, first and last day), `steps`, `processes`, `device`, `versions`.
    """
    import platform
    from importlib.metadata import version

    import torch

    args = trainer.args
    facts: dict[str, Any] = {"arguments": told_arguments(args.to_dict()), "steps": int(trainer.state.global_step)}
    facts["processes"] = int(args.world_size)
    facts["splits"] = {}
    for name, dataset in (("training", trainer.train_dataset), ("held out", trainer.eval_dataset)):
        if dataset is None or isinstance(dataset, Mapping) or not hasattr(dataset, "__len__"):
            continue
        facts["splits"][name] = {"observations": len(dataset)}
        times = getattr(dataset, "metadata", {}).get("time_nominal")
        if times is not None and len(times):
            facts["splits"][name] |= {"first": f"{times.min():%Y-%m-%d}", "last": f"{times.max():%Y-%m-%d}"}
    if args.device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(args.device)
        facts["peak_device_bytes"] = int(torch.cuda.max_memory_allocated(args.device))
    else:
        facts["device"] = f"{args.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
    facts["versions"] = {name: version(name) for name in ("solarchip_hf", "torch", "transformers")}
    return facts


def check_told(told: Mapping[str, Any]) -> None:
    """Refuses names that a card does not know, and results of another form.

    Raises:
        ValueError: With what was expected.
    """
    unknown = sorted(set(told) - set(TOLD))
    if unknown:
        raise ValueError(f"card: expected some of {', '.join(TOLD)}, got {', '.join(unknown)}.")
    fields = {entry.name for entry in dataclasses.fields(CardResult)}
    for row in told.get("results") or []:
        if not isinstance(row, CardResult) and not (isinstance(row, Mapping) and set(row) <= fields):
            raise ValueError(f"results: expected CardResult or mappings of {', '.join(sorted(fields))}, got {row!r}.")
    for name in told.get("datasets") or []:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise ValueError(f"datasets: expected repositories as 'owner/name', got {name!r}.")


__all__ = [
    "FACTS",
    "TOLD",
    "CardFacts",
    "check_told",
    "kind_of",
    "read_facts",
    "read_json",
    "readable_size",
    "save_facts",
    "told_arguments",
    "training_facts",
    "weights_in",
]
