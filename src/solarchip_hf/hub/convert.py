"""Converts checkpoints of the SolarCHIP research code: `python -m solarchip_hf.hub.convert CHECKPOINT OUTPUT_DIR`.

The folder holds `config.json`, the weights as safetensors, `preprocessor_config.json` and `conversion_report.json`;
`AutoModel`, `AutoModelForPreTraining` and `AutoImageProcessor` load it. Before it is put in place, the model is loaded
from it and compared in float64 with the checkpoint's own layout, run on the same random images.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from solarchip_hf import SolarChipConfig, SolarChipForPreTraining, SolarChipImageProcessor, SolarChipModel
from solarchip_hf.models.image_statistics import published_statistics
from solarchip_hf.models.losses import MAX_LOGIT_SCALE
from solarchip_hf.models.modalities import MODALITY_NAMES, resolve_modality

from .conversion_files import flare_encoder, in_flare_words, read_state_dict, split_branches
from .conversion_forward import TOLERANCE, compare_layouts
from .conversion_layout import TEMPERATURES, ConversionError, infer_backbone

PREPROCESSING = ("zscore", "log1p")
REPORT_NAME = "conversion_report.json"
# Sizes whose number of heads the research code's configurations name: (hidden, layers, projection) -> heads.
KNOWN_HEADS = {(768, 12, 768): 12, (768, 6, 512): 8}

_RASTER = (
    "decoder_layout 'raster': the research decoder reshapes its sequence of tokens straight to the image, so that a "
    "token fills rows of the image instead of its patch; the trained weights know no other order."
)


@dataclass
class ConversionReport:
    """What became of every key.

    Attributes:
        checkpoint: Name of the file.
        architecture: Class of the model that was saved.
        weight_sharing: How modalities share towers, as in `SolarChipConfig`.
        modalities: The modalities converted, in their order.
        assumed: What the file cannot tell and where it was taken from.
        used: Keys of the model by key of the checkpoint.
        ignored: The reason by key of the checkpoint.
        missing: Keys of the layout that the checkpoint lacks; empty, since any stops the conversion.
        agreement: Largest differences between the two layouts on random images, in float64.
        notes: What else one should know.
    """

    checkpoint: str
    architecture: str
    weight_sharing: str
    modalities: list[str]
    assumed: dict[str, str] = field(default_factory=dict)
    used: dict[str, list[str]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    agreement: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _modalities(branches: Sequence[str], wanted: Sequence[str] | None) -> tuple[str, dict[str, str]]:
    """The way of sharing weights, and the branch of each modality to convert."""
    names = [resolve_modality(name) for name in wanted] if wanted else None
    if names and len(set(names)) != len(names):
        raise ConversionError(f"modalities: expected every modality once, got {', '.join(names)}.")
    if set(branches) == {"all"}:
        return "shared", dict.fromkeys(names or MODALITY_NAMES, "all")
    if set(branches) == {"hmi", "aia"}:
        return "instrument", {name: "hmi" if name == "hmi" else "aia" for name in names or MODALITY_NAMES}
    held = {}
    for branch in branches:
        try:
            name = resolve_modality(branch)
        except ValueError:
            name = None
        if name is None or name in held:
            raise ConversionError(
                f"model_dict: expected one branch for each modality, or 'hmi' and 'aia', or 'all', got "
                f"{', '.join(branches)}.",
                unexpected=[f"model_dict.{branch}"],
            )
        held[name] = branch
    absent = [name for name in names or () if name not in held]
    if absent:
        raise ConversionError(f"modalities: expected some of {', '.join(held)}, got {', '.join(absent)}.")
    return "modality", {name: held[name] for name in names or held}


def _heads(fields: dict[str, Any], projection: int, given: int | None) -> tuple[int, str]:
    hidden, layers = fields["hidden_size"], fields["num_hidden_layers"]
    known = KNOWN_HEADS.get((hidden, layers, projection))
    if given is not None:
        if given < 1 or hidden % given:
            raise ConversionError(f"num_attention_heads: expected a divisor of the width {hidden}, got {given}.")
        return given, f"{given}, as given"
    if known is None:
        raise ConversionError(
            f"num_attention_heads: expected a number, since no tensor's shape tells it, got none for {hidden=}, "
            f"{layers=}. Pass --num_attention_heads: `heads` in the configuration that the model was trained with."
        )
    return known, f"{known}, as the research code's configuration of {hidden=}, {layers=}, {projection=} has it"


def _processor(config: SolarChipConfig, preprocessing: str) -> SolarChipImageProcessor:
    """The input of the research code: raw DN and gauss, resized, signed logarithm, with or without z-score."""
    size, statistics = config.image_size, published_statistics()
    if preprocessing == "zscore" and size == statistics["size"]:
        return SolarChipImageProcessor.published(modalities=config.modalities)
    if preprocessing == "log1p":
        source = "none: the converted model takes the signed logarithm without z-score"
        rows = {name: {**row, "mean": 0.0, "std": 1.0} for name, row in statistics["modalities"].items()}
    else:
        source = f"{statistics['source']}; of 1024 px, applied at {size} px as the research code does"
        rows = statistics["modalities"]
    return SolarChipImageProcessor(
        modalities=config.modalities,
        size=size,
        geometry="none",
        photometry="dn",
        scaling="log1p",
        off_disk="zero",
        statistics={**statistics, "size": size, "source": source, "modalities": rows},
    )


def _branch_problems(
    branch: str, tensors: dict[str, torch.Tensor], expected_shapes: dict[str, tuple[int, ...]]
) -> tuple[list[str], list[str], list[str]]:
    """Missing keys, unexpected keys, and sentences on tensors that do not fit, of one branch."""
    prefix = f"model_dict.{branch}."
    missing = [prefix + key for key in expected_shapes if key not in tensors]
    unexpected = [prefix + key for key in tensors if key not in expected_shapes]
    wrong = []
    for key, tensor in tensors.items():
        expected = expected_shapes.get(key)
        if expected is not None and tuple(tensor.shape) != expected:
            wrong.append(f"{prefix}{key}: expected shape {expected}, got {tuple(tensor.shape)}.")
        elif not tensor.is_floating_point():
            wrong.append(f"{prefix}{key}: expected floating numbers, got {tensor.dtype}.")
    return missing, unexpected, wrong


def _raise_problems(missing: list[str], unexpected: list[str], wrong: list[str]) -> None:
    if not (missing or unexpected or wrong):
        return
    parts = []
    for keys, text in ((missing, "lacks {} keys that the layout has"), (unexpected, "holds {} keys that it has not")):
        if keys:
            more = "" if len(keys) <= 5 else f", ... ({len(keys) - 5} more)"
            parts.append(f"it {text.format(len(keys))}: {', '.join(sorted(keys)[:5])}{more}")
    parts += wrong[:3]
    raise ConversionError(
        "the checkpoint does not fit the layout that its shapes tell. " + "; ".join(parts) + " Nothing is loaded "
        "loosely: look whether the file is of another version of the model.",
        missing=sorted(missing),
        unexpected=sorted(unexpected),
    )


def _sort_outside(
    outside: list[str], others: list[str], report: ConversionReport, *, temperatures: Sequence[str]
) -> tuple[list[str], list[str], list[str]]:
    """Accounts for the keys that belong to no branch; gives problems as `_branch_problems` does."""
    unexpected = []
    for key in outside:
        if key.startswith("rec_loss_fn."):
            report.ignored[key] = "network of the perceptual term of the research code's loss, no part of the model"
        elif key not in temperatures:
            unexpected.append(key)
    for name in others:
        report.ignored[f"({name})"] = "entry of the file beside its weights: state of the training"
    return [key for key in temperatures if key not in outside], unexpected, []


def _temperatures(state: dict[str, torch.Tensor], report: ConversionReport) -> torch.Tensor:
    wrong = [f"{key}: expected one number, got shape {tuple(state[key].shape)}." for key in TEMPERATURES]
    _raise_problems([], [], [text for key, text in zip(TEMPERATURES, wrong, strict=True) if state[key].numel() != 1])
    scales = torch.stack([state[key].float().reshape(()) for key in TEMPERATURES])
    report.used.update({key: [f"logit_scales[{index}]"] for index, key in enumerate(TEMPERATURES)})
    if (scales > MAX_LOGIT_SCALE).any():
        report.notes.append(
            f"logit_scales {[round(value, 4) for value in scales.tolist()]}: the losses here bound them by ln 100, "
            "those of the research code do not; contrastive losses differ where they are above."
        )
    return scales


def _build_config(
    fields: dict[str, Any], projection: int, sharing: str, modalities: list[str], options: dict[str, Any]
) -> tuple[SolarChipConfig, dict[str, str]]:
    """The configuration, and what of it the file cannot tell."""
    image_size, heads = options["image_size"], options["num_attention_heads"]
    assumed = {}
    if fields["model_type"] == "solarchip_vit":
        number, assumed["num_attention_heads"] = _heads(fields, projection, heads)
        fields = {**fields, "num_attention_heads": number}
        if image_size not in (None, fields["image_size"]):
            raise ConversionError(
                f"image_size: expected {fields['image_size']}, which the position table has, got {image_size}."
            )
        weights = {"cls": 0.05, "patch": 0.001, "intra": 0.0001}
    else:
        if heads is not None:
            raise ConversionError("num_attention_heads: expected none for a CNN, whose attention has a single head.")
        fields = {**fields, "image_size": 1024 if image_size is None else image_size}
        assumed["image_size"] = f"{fields['image_size']}, {'as published' if image_size is None else 'as given'}"
        weights = {"cls": 0.01, "patch": 0.0001, "intra": 0.0001}
    config = SolarChipConfig(
        backbone_config=fields,
        modalities=modalities,
        weight_sharing=sharing,
        use_modality_embedding=False,
        projection_dim=projection,
        projection_centering="none",
        min_disk_fraction=0.0,
        mask_reconstruction=False,
        gather_negatives=False,
        pairing="anchor" if "hmi" in modalities or len(modalities) == 1 else "all",
        reconstruction_loss="l2",
        cls_loss_weight=weights["cls"],
        patch_loss_weight=weights["patch"],
        intra_loss_weight=weights["intra"],
    )
    assumed["loss weights"] = (
        "the published ones of the backbone; the file does not hold them, and the research code adds up the squared "
        "errors of all pixels where this package takes their mean"
    )
    return config, assumed


def _target_shapes(config: SolarChipConfig, model_class: type) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = model_class(config)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _write(
    folder: Path, config: SolarChipConfig, weights: dict[str, torch.Tensor], processor: SolarChipImageProcessor
) -> None:
    config.save_pretrained(folder)
    save_torch_state_dict(weights, folder, filename_pattern="model{suffix}.safetensors", metadata={"format": "pt"})
    processor.save_pretrained(folder)


def _load_whole(folder: Path, model_class: type) -> SolarChipForPreTraining | SolarChipModel:
    model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
    if wrong:
        raise ConversionError(f"the converted folder: expected every tensor to load, got {wrong}. Please report this.")
    return model


def _check_output(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConversionError(f"{folder}: expected a folder to write to, got a file.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConversionError(f"{folder}: expected a new or an empty folder, got one with files. Choose another.")


def _convert(
    state: dict[str, torch.Tensor],
    others: list[str],
    name: str,
    output_dir: Path,
    options: dict[str, Any],
    head: dict[str, str] | None = None,
) -> ConversionReport:
    """Converts the tensors of a file; with `head`, the keys that were left out of it, an encoder alone."""
    model_class = SolarChipForPreTraining if head is None else SolarChipModel
    base = "solarchip." if head is None else ""
    branches, outside = split_branches(state)
    sharing, branch_of = _modalities(list(branches), options["modalities"])
    report = ConversionReport(name, model_class.__name__, sharing, list(branch_of), ignored=dict(head or {}))
    problems = [_sort_outside(outside, others, report, temperatures=TEMPERATURES if head is None else ())]
    first = next(iter(branch_of.values()))
    fields, entries, projection = infer_backbone({k: tuple(v.shape) for k, v in branches[first].items()}, first)
    entries = [entry for entry in entries if head is None or entry.encodes]
    config, assumed = _build_config(fields, projection, sharing, list(branch_of), options)
    config.architectures = [model_class.__name__]
    report.assumed |= {**assumed, "preprocessing": options["preprocessing"]}
    if fields.get("decoder_layout") == "raster" and head is None:
        report.notes.append(_RASTER)
    shapes = _target_shapes(config, model_class)
    tower_of = {branch_of[served[0]]: tower for tower, served in config.towers().items()}
    expected = {
        entry.source: entry.source_shape(shapes[entry.named(tower_of[first], base=base)[0]]) for entry in entries
    }
    problems += [_branch_problems(branch, held, expected) for branch, held in branches.items()]
    _raise_problems(*([text for part in kind for text in part] for kind in zip(*problems, strict=True)))

    weights = {"logit_scales": _temperatures(state, report)} if head is None else {}
    for branch, held in branches.items():
        for entry in entries:
            key = f"model_dict.{branch}.{entry.source}"
            if branch not in tower_of:
                report.ignored[key] = "of a branch that was not asked for"
                continue
            targets = entry.named(tower_of[branch], base=base)
            report.used[key if head is None else in_flare_words(key)] = list(targets)
            weights.update(zip(targets, entry.apply(held[entry.source]), strict=True))
    if weights.keys() != shapes.keys():
        differing = sorted(weights.keys() ^ shapes.keys())
        raise ConversionError(
            f"the key tables: expected exactly the model's keys, got {differing[:5]} on one side only."
        )
    dtypes = sorted({str(tensor.dtype) for tensor in state.values()} - {"torch.float32"})
    if dtypes:
        report.notes.append(f"tensors of {', '.join(dtypes)} were widened to float32.")
    config.conversion_notes = report.notes

    standing = next(parent for parent in output_dir.absolute().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=standing) as scratch:
        folder = Path(scratch) / "converted"
        folder.mkdir()
        _write(folder, config, weights, _processor(config, options["preprocessing"]))
        log_scales = weights.get("logit_scales")
        weights.clear()  # the model to compare is loaded from the folder
        per_modality = {name: branches[branch] for name, branch in branch_of.items()}
        report.agreement = compare_layouts(_load_whole(folder, model_class), per_modality, log_scales)
        off = {term: value for term, value in report.agreement.items() if not value <= TOLERANCE}
        if off:
            raise ConversionError(
                f"the converted model: expected what the checkpoint's own layout gives within {TOLERANCE}, got "
                f"differences {off}. Nothing is saved."
            )
        (folder / REPORT_NAME).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
        output_dir.mkdir(parents=True, exist_ok=True)
        folder.replace(output_dir)  # within one file system: all of it or nothing
    return report


def convert_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    *,
    num_attention_heads: int | None = None,
    image_size: int | None = None,
    preprocessing: str = "zscore",
    modalities: Sequence[str] | None = None,
    encoder_only: bool = False,
) -> ConversionReport:
    """Converts a pretraining checkpoint of the research code into a folder that the Auto classes load.

    Sizes, the kind of backbone and the way of sharing weights are read from keys and shapes. Only the branches asked
    for are read; the others are looked at by name and shape.

    Args:
        checkpoint: A Lightning file with `model_dict.*` keys.
        output_dir: A new or empty folder; it appears only when all is well.
        num_attention_heads: Heads of a ViT, which no shape tells; known for the sizes of `KNOWN_HEADS`.
        image_size: Side of the images in pixels for a CNN, which no shape tells; None: 1024, as published.
        preprocessing: `"zscore"`: signed logarithm and the published statistics; `"log1p"`: without them (the first
            version).
        modalities: Those to convert; None: all that the file holds, all eleven where branches are shared.
        encoder_only: The file is a flare classifier of the research code, whose tuned HMI encoder alone is converted,
            to a `SolarChipModel`; its head has no counterpart here and is listed as ignored.

    Returns:
        The report, which the folder holds too.

    Raises:
        FileNotFoundError: There is no such file.
        ConversionError: The file cannot be read safely, is of another layout, lacks a key or has one too many, or the
            converted model disagrees with it. Nothing is written then.
        ValueError: A modality of no known name.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    if preprocessing not in PREPROCESSING:
        raise ConversionError(f"preprocessing: expected one of {', '.join(PREPROCESSING)}, got {preprocessing!r}.")
    options = {
        "num_attention_heads": num_attention_heads,
        "image_size": image_size,
        "preprocessing": preprocessing,
        "modalities": modalities,
    }
    _check_output(output_dir)
    state, others = read_state_dict(checkpoint)
    if not encoder_only:
        return _convert(state, others, checkpoint.name, output_dir, options)
    state, head = flare_encoder(state)
    try:
        return _convert(state, others, checkpoint.name, output_dir, options, head=head)
    except ConversionError as error:
        words = {name: map(in_flare_words, getattr(error, name)) for name in ("missing", "unexpected")}
        raise ConversionError(in_flare_words(str(error)), **words) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns 0, or 1 with the reason on the standard error."""
    parser = argparse.ArgumentParser(prog="python -m solarchip_hf.hub.convert", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="Lightning file of the research code's pretraining")
    parser.add_argument("output_dir", help="new or empty folder")
    parser.add_argument("--num_attention_heads", type=int, help="heads of a ViT; needed unless its size is a known one")
    parser.add_argument("--image_size", type=int, help="pixels on a side, for a CNN (1024)")
    parser.add_argument("--preprocessing", choices=PREPROCESSING, default=PREPROCESSING[0], help="what it was fed with")
    parser.add_argument("--encoder_only", action="store_true", help="of a flare classifier: its HMI encoder alone")
    parser.add_argument("--modalities", nargs="+", help="convert these only, as: hmi 171 193")
    options = vars(parser.parse_args(arguments))
    try:
        report = convert_checkpoint(**options)
    except (ConversionError, FileNotFoundError, ValueError) as error:
        print(f"not converted: {error}", file=sys.stderr)
        for name in ("missing", "unexpected"):
            for key in getattr(error, name, []):
                print(f"  {name}: {key}", file=sys.stderr)
        return 1
    print(f"{options['output_dir']}: {report.architecture} ({report.weight_sharing}) of {', '.join(report.modalities)}")
    for key, targets in report.used.items():
        print(f"  used     {key} -> {', '.join(targets)}")
    for key, reason in report.ignored.items():
        print(f"  ignored  {key}: {reason}")
    print(f"  missing  {', '.join(report.missing) or 'none'}")
    for name, value in report.assumed.items():
        print(f"  assumed  {name}: {value}")
    for note in report.notes:
        print(f"  note     {note}")
    for term, value in report.agreement.items():
        print(f"  differs  {term}: {value:.1e} at the most, on random images in float64")
    return 0


__all__ = ["ConversionError", "ConversionReport", "convert_checkpoint", "main"]

if __name__ == "__main__":
    sys.exit(main())
